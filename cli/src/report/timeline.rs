//! The last upgrades as two bars each: what was prepared while the guest ran, and the pause, on scales of their own.

use std::fmt::Write;

use serde_json::Value;

use super::html::escape;
use crate::units;

/// Steps while the guest runs, and steps in which it stands still, by the names in the log, with a class for their colour.
const BEFORE: [(&str, &str); 5] = [
    ("request", "s1"),
    ("spawn", "s2"),
    ("agree", "s3"),
    ("hand-over", "s4"),
    ("build", "s5"),
];
const PAUSE: [(&str, &str); 5] = [
    ("park", "s6"),
    ("save", "s7"),
    ("load", "s8"),
    ("commit", "s9"),
    ("run", "s10"),
];

/// One upgrade's record.
struct Upgrade<'a> {
    time: u64,
    fields: &'a Value,
}

impl<'a> Upgrade<'a> {
    fn of(record: &'a Value) -> Option<Self> {
        Some(Self {
            time: record.get("time")?.as_u64()?,
            fields: record.get("unmapped")?,
        })
    }

    fn text(&self, name: &str) -> &'a str {
        self.fields
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    fn number(&self, name: &str) -> u64 {
        self.fields
            .get(name)
            .and_then(Value::as_u64)
            .unwrap_or_default()
    }

    /// Microseconds in one step.
    fn step(&self, name: &str) -> u64 {
        let phases = self.fields.get("phases").and_then(Value::as_array);
        phases
            .into_iter()
            .flatten()
            .filter(|phase| phase.get("step").and_then(Value::as_str) == Some(name))
            .filter_map(|phase| phase.get("us").and_then(Value::as_u64))
            .fold(0, u64::saturating_add)
    }

    fn sum(&self, steps: &[(&str, &str)]) -> u64 {
        steps
            .iter()
            .map(|(name, _)| self.step(name))
            .fold(0, u64::saturating_add)
    }
}

/// The section, or nothing when there was no upgrade.
pub(super) fn section(records: &[Value]) -> String {
    let upgrades: Vec<Upgrade<'_>> = records.iter().filter_map(Upgrade::of).collect();
    if upgrades.is_empty() {
        return "<p class=\"dim\">The worker has not been replaced yet.</p>".to_owned();
    }
    let longest = |steps: &[(&str, &str)]| {
        let sums = upgrades.iter().map(|upgrade| upgrade.sum(steps));
        sums.max().unwrap_or(0).max(1)
    };
    let (before, pause) = (longest(&BEFORE), longest(&PAUSE));
    let mut out = String::new();
    legend(&mut out, "the guest runs", &BEFORE, before);
    legend(&mut out, "the guest stands still", &PAUSE, pause);
    out.push_str("<ol class=\"upgrades\">");
    for upgrade in upgrades.iter().rev() {
        let outcome = upgrade.text("outcome");
        let style = match outcome {
            "committed" | "rehearsed" => "good",
            "aborted" => "warn",
            _ => "bad",
        };
        let _ = write!(
            out,
            "<li><div class=\"upgrade-head\"><span class=\"badge {style}\">{}</span><span>to generation {}</span><time>{}</time></div>",
            escape(outcome),
            upgrade.number("generation"),
            super::html::time(upgrade.time)
        );
        bar(&mut out, upgrade, &BEFORE, before, "prepared in");
        bar(&mut out, upgrade, &PAUSE, pause, "paused for");
        let reason = upgrade.text("reason");
        if !reason.is_empty() {
            let _ = write!(out, "<p class=\"reason\">{}</p>", escape(reason));
        }
        out.push_str("</li>");
    }
    out.push_str("</ol>");
    out
}

fn legend(out: &mut String, title: &str, steps: &[(&str, &str)], longest: u64) {
    let _ = write!(out, "<p class=\"legend\"><b>{title}</b>");
    for (name, class) in steps {
        let _ = write!(out, "<span><i class=\"{class}\"></i>{name}</span>");
    }
    let _ = write!(
        out,
        "<span class=\"dim\">full width {}</span></p>",
        units::microseconds(longest)
    );
}

fn bar(out: &mut String, upgrade: &Upgrade<'_>, steps: &[(&str, &str)], longest: u64, words: &str) {
    let sum = upgrade.sum(steps);
    let _ = write!(
        out,
        "<div class=\"bar\"><svg viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{words} {}\"><rect class=\"rail\" width=\"1000\" height=\"10\"/>",
        units::microseconds(sum)
    );
    // In thousandths of the longest: what is shorter than one is still there to be seen.
    let scaled = |us: u64| us.saturating_mul(1000) / longest;
    let mut x = 0;
    for (name, class) in steps {
        let us = upgrade.step(name);
        if us > 0 {
            let width = scaled(us).max(2);
            let _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{x}\" width=\"{width}\" height=\"10\"><title>{name}: {}</title></rect>",
                units::microseconds(us)
            );
            x += width;
        }
    }
    let _ = write!(
        out,
        "</svg><span>{}</span></div>",
        if sum == 0 {
            "–".to_owned()
        } else {
            units::microseconds(sum)
        }
    );
}
