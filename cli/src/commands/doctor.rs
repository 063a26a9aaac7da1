//! `baton doctor`: whether this host can run VMs, and what to do about what it lacks.

use baton_ipc::control::Exit;
use baton_ipc::control::Refusal;
use serde_json::json;

use crate::doctor;
use crate::doctor::Check;
use crate::doctor::Host;
use crate::doctor::Level;
use crate::failure::unfit;
use crate::output::Output;
use crate::output::Style;

pub(crate) fn execute(output: &Output) -> Result<Exit, Refusal> {
    let checks = doctor::examine(&Host::this(), None);
    let fit = checks.iter().all(|check| check.level != Level::Missing);
    if output.json() {
        let checks = serde_json::to_value(&checks)
            .map_err(|error| unfit(format!("cannot print the checks: {error}"), ""))?;
        output.document(&json!({ "fit": fit, "checks": checks }))?;
    } else {
        output.text(&lines(&checks, output))?;
        output.hint(match fit {
            true => "\nVMs run here: baton demo",
            false => "\nno VM runs here yet: see what is missing above",
        });
    }
    Ok(if fit { Exit::Done } else { Exit::Unfit })
}

/// A line for each check, and one for each remedy.
pub(crate) fn lines(checks: &[Check], output: &Output) -> String {
    let width = checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let lines = checks.iter().flat_map(|check| {
        let (style, level) = match check.level {
            Level::Ok => (Style::Good, "ok"),
            Level::Warn => (Style::Warning, "warn"),
            Level::Missing => (Style::Bad, "missing"),
        };
        let space = " ".repeat("missing".len() - level.len());
        let first = format!(
            "{}{space}  {:<width$}  {}",
            output.paint(style, level),
            check.id,
            check.found
        );
        let remedy = (!check.remedy.is_empty())
            .then(|| format!("         {:<width$}  → {}", "", check.remedy));
        std::iter::once(first).chain(remedy)
    });
    lines.collect::<Vec<_>>().join("\n")
}
