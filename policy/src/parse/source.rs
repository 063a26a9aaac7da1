//! What is being parsed, for the places of errors, and what is checked the same way everywhere.

use std::ops::Range;

use toml::Spanned;

use super::error::{Place, PolicyError, Problem};
use crate::condition::spelling::nearest;
use crate::syscalls::Syscall;

/// The least length of a reason: a word or two.
const MIN_WHY: usize = 4;

/// What is being parsed, for the places of errors.
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    pub(super) origin: &'a str,
}

impl Source<'_> {
    pub(super) fn error(&self, span: Range<usize>, problem: Problem) -> PolicyError {
        let place = Some(Place::new(self.text, &span));
        PolicyError {
            origin: self.origin.to_owned(),
            place,
            problem: Box::new(problem),
        }
    }

    pub(super) fn toml(&self, error: &toml::de::Error) -> PolicyError {
        let place = error.span().map(|span| Place::new(self.text, &span));
        let problem = Box::new(Problem::Toml(error.message().to_owned()));
        PolicyError {
            origin: self.origin.to_owned(),
            place,
            problem,
        }
    }

    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        Place::new(self.text, span).line
    }

    pub(super) fn reason(&self, why: Spanned<String>) -> Result<String, PolicyError> {
        let span = why.span();
        let text = one_line(&why.into_inner());
        self.plain(span.clone(), &text)?;
        if text.chars().count() < MIN_WHY {
            return Err(self.error(span, Problem::NoReason(text)));
        }
        Ok(text)
    }

    /// What people read may not do anything to their terminal.
    pub(super) fn plain(&self, span: Range<usize>, text: &str) -> Result<(), PolicyError> {
        match text.chars().find(|c| c.is_control()) {
            None => Ok(()),
            Some(control) => Err(self.error(span, Problem::Control(control))),
        }
    }

    pub(super) fn call(&self, name: &Spanned<String>) -> Result<Syscall, PolicyError> {
        Syscall::from_name(name.get_ref()).ok_or_else(|| {
            let problem = Problem::UnknownCall {
                name: name.get_ref().clone(),
                suggestion: nearest(name.get_ref(), Syscall::all().map(|(name, _)| name)),
            };
            self.error(name.span(), problem)
        })
    }
}

pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
