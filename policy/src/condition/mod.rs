//! What the arguments of a call must be: masked comparisons, conjunctions of them, alternatives of those.
//!
//! Conditions are kept as they compile, and judge a call by the same definition. [`text`] reads them, [`cover`]
//! compares them.

pub mod cover;
pub(crate) mod spelling;
pub mod text;

use crate::constants::{self, Family};
use crate::syscalls::{Syscall, Width};

/// One comparison: the call is let through when `argument & mask == value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comparison {
    /// Which argument, 0 to 5.
    pub index: u8,
    /// How much of it the kernel looks at. `mask` and `value` have no bits beyond.
    pub width: Width,
    /// The bits that are compared. All bits of the width: plain equality.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

/// Comparisons that must all hold, sorted.
pub type Conjunction = Vec<Comparison>;

impl Comparison {
    fn all_bits(width: Width) -> u64 {
        match width {
            Width::Dword => u64::from(u32::MAX),
            Width::Qword => u64::MAX,
        }
    }

    /// Whether every bit of the argument is compared.
    #[must_use]
    pub fn is_equality(&self) -> bool {
        self.mask == Self::all_bits(self.width)
    }

    /// Whether the comparison holds of these arguments.
    #[must_use]
    pub fn holds(&self, arguments: &[u64; 6]) -> bool {
        arguments
            .get(usize::from(self.index))
            .is_some_and(|argument| argument & self.mask == self.value)
    }

    /// The comparison in words, with symbolic names where there are any.
    #[must_use]
    pub fn describe(&self, call: Syscall) -> String {
        let argument = call
            .arguments()
            .iter()
            .find(|argument| argument.index == self.index);
        let name = argument.map_or_else(
            || format!("arg{}", self.index),
            |argument| argument.name.to_owned(),
        );
        let family = argument.map_or(Family::Number, |argument| argument.family);
        let all = Self::all_bits(self.width);
        if self.mask == all {
            format!("{name} is {}", symbolic(family, self.value))
        } else if self.value == 0 && self.mask.count_ones() <= 16 {
            format!("{name} lacks {}", symbolic(family, self.mask))
        } else if self.value == 0 {
            format!("{name} within {}", symbolic(family, all & !self.mask))
        } else if self.value == self.mask {
            format!("{name} has {}", symbolic(family, self.value))
        } else {
            format!("{name} & {:#x} is {:#x}", self.mask, self.value)
        }
    }
}

/// A conjunction in words.
#[must_use]
pub fn describe(call: Syscall, conjunction: &[Comparison]) -> String {
    conjunction
        .iter()
        .map(|comparison| comparison.describe(call))
        .collect::<Vec<_>>()
        .join(" and ")
}
/// `value` as the constants of `family`: one by name, or one and single bits, or a number.
#[must_use]
pub fn symbolic(family: Family, value: u64) -> String {
    let mut bits: Vec<_> = constants::of_family(family)
        .filter(|(_, bits)| bits.count_ones() == 1)
        .collect();
    bits.sort_by_key(|(_, bit)| std::cmp::Reverse(*bit));
    let mut rest = value;
    let mut names = Vec::new();
    for (name, bit) in bits {
        if constants::name(family, rest).is_some() {
            break;
        }
        if rest & bit != 0 {
            names.insert(0, name);
            rest &= !bit;
        }
    }
    match constants::name(family, rest) {
        Some(name) if names.is_empty() || rest != 0 => names.insert(0, name),
        _ if rest == 0 && !names.is_empty() => {}
        _ if value < 10 => return value.to_string(),
        _ => return format!("{value:#x}"),
    }
    names.join("|")
}
