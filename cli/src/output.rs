//! One of three ways to say something: a person's terminal, a pipe's plain lines, or one JSON document.
//!
//! Results go to standard output; errors, notes and progress go to standard error.

use std::io::IsTerminal;
use std::io::Write;

use baton_ipc::control::Refusal;
use serde_json::Value;
use serde_json::json;

use crate::failure::unfit;

/// What a piece of text is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    /// All is well.
    Good,
    /// Look at this.
    Warning,
    /// Something is wrong.
    Bad,
    /// A heading or a name.
    Strong,
    /// Less important.
    Dim,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Good => "32",
            Self::Warning => "33",
            Self::Bad => "31",
            Self::Strong => "1",
            Self::Dim => "2",
        }
    }
}

/// Where and how to say it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    terminal: bool,
    colour: bool,
    error_colour: bool,
    live: bool,
}

impl Output {
    /// How this process's standard streams want it.
    pub(crate) fn new(json: bool) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = !set("NO_COLOR") && !dumb;
        let terminal = std::io::stdout().is_terminal();
        let error_terminal = std::io::stderr().is_terminal();
        Self {
            json,
            terminal,
            colour: terminal && colour,
            error_colour: error_terminal && colour,
            live: error_terminal && !dumb,
        }
    }

    /// Whether one JSON document is wanted.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// Whether a person reads standard output.
    pub(crate) fn terminal(&self) -> bool {
        self.terminal && !self.json
    }

    /// `text`, in colour where that is wanted.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        paint(self.colour, style, text)
    }

    /// The command's one JSON document.
    pub(crate) fn document(&self, document: &Value) -> Result<(), Refusal> {
        if self.terminal {
            self.text(&format!("{document:#}"))
        } else {
            self.text(&document.to_string())
        }
    }

    /// Text and a newline on standard output. A reader that has gone away is no error.
    pub(crate) fn text(&self, text: &str) -> Result<(), Refusal> {
        let mut stdout = std::io::stdout().lock();
        match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(unfit(format!("cannot write the output: {error}"), ""))
            }
            _ => Ok(()),
        }
    }

    /// Something to know, on standard error.
    pub(crate) fn note(&self, text: &str) {
        let mark = paint(self.error_colour, Style::Warning, "note:");
        say(&format!("{mark} {text}\n"));
    }

    /// What is going on, on standard error, for a person at a terminal only.
    pub(crate) fn hint(&self, text: &str) {
        if self.live && !self.json {
            say(&format!("{}\n", paint(self.error_colour, Style::Dim, text)));
        }
    }

    /// Why the command failed: for people on standard error; with `--json` also as the document.
    pub(crate) fn failure(&self, refusal: &Refusal) {
        if self.json {
            // The exit status says the rest if this cannot be written either.
            let _ = self.document(&json!({ "error": error(refusal) }));
        }
        self.complain(refusal);
    }

    /// What went wrong, on standard error.
    pub(crate) fn complain(&self, refusal: &Refusal) {
        let mark = paint(self.error_colour, Style::Bad, "error:");
        say(&format!("{mark} {}\n", printable(&refusal.to_string())));
    }

    /// A line that shows progress.
    pub(crate) fn live(&self) -> Live {
        Live {
            enabled: self.live && !self.json,
            colour: self.error_colour,
            shown: false,
        }
    }
}

/// A refusal's JSON.
pub(crate) fn error(refusal: &Refusal) -> Value {
    json!({
        "exit": refusal.exit,
        "code": refusal.exit.code(),
        "reason": refusal.reason,
        "remedy": refusal.remedy,
    })
}

/// Text that another process wrote, with nothing in it that a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

fn paint(colour: bool, style: Style, text: &str) -> String {
    if colour {
        format!("\x1b[{}m{text}\x1b[0m", style.code())
    } else {
        text.to_owned()
    }
}

/// Writes to standard error; there is nowhere to report that it cannot be written.
fn say(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// A line at the bottom of a terminal that is drawn over, and gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    enabled: bool,
    colour: bool,
    shown: bool,
}

impl Live {
    /// Draws `text`, cut to the terminal's width.
    pub(crate) fn draw(&mut self, text: &str) {
        if self.enabled {
            // A terminal that does not know its width says 0.
            let width = rustix::termios::tcgetwinsize(std::io::stderr())
                .ok()
                .map(|size| usize::from(size.ws_col))
                .filter(|width| *width > 0)
                .unwrap_or(80);
            let text: String = text.chars().take(width.saturating_sub(1)).collect();
            say(&format!(
                "\r\x1b[2K{}",
                paint(self.colour, Style::Dim, &text)
            ));
            self.shown = true;
        }
    }

    /// Takes the line away.
    pub(crate) fn clear(&mut self) {
        if self.shown {
            say("\r\x1b[2K");
            self.shown = false;
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.clear();
    }
}

/// How full something is, in eighths of a character.
pub(crate) fn bar(done: u64, all: u64, width: usize) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = usize::try_from(done.min(all).saturating_mul(8 * width as u64) / all.max(1))
        .unwrap_or(usize::MAX)
        .min(8 * width);
    let part = PARTS.get(eighths % 8).copied().unwrap_or_default();
    format!("{}{part}", "█".repeat(eighths / 8))
}

/// A table: columns as wide as they need, or, for a pipe, fields separated by tabs and no heading.
pub(crate) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<(Option<Style>, String)>>,
}

impl Table {
    /// An empty table with these columns.
    pub(crate) fn new(heading: &[&'static str]) -> Self {
        Self {
            heading: heading.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<(Option<Style>, String)>) {
        self.rows.push(
            cells
                .into_iter()
                .map(|(style, text)| (style, printable(&text.replace(['\n', '\t'], " "))))
                .collect(),
        );
    }

    /// Draws it, without a newline at its end.
    pub(crate) fn draw(&self, output: &Output) -> String {
        if !output.terminal() {
            let rows = self.rows.iter().map(|row| {
                let cells: Vec<&str> = row.iter().map(|(_, text)| text.as_str()).collect();
                cells.join("\t")
            });
            return rows.collect::<Vec<_>>().join("\n");
        }
        let heading: Vec<(Option<Style>, String)> = self
            .heading
            .iter()
            .map(|name| (Some(Style::Strong), (*name).to_owned()))
            .collect();
        let all: Vec<&Vec<(Option<Style>, String)>> =
            std::iter::once(&heading).chain(&self.rows).collect();
        let widths: Vec<usize> = (0..self.heading.len())
            .map(|column| {
                all.iter()
                    .filter_map(|row| row.get(column))
                    .map(|(_, text)| text.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let lines = all.iter().map(|row| {
            let cells = row.iter().zip(&widths).map(|((style, text), width)| {
                let space = " ".repeat(width - text.chars().count());
                match style {
                    Some(style) => format!("{}{space}", output.paint(*style, text)),
                    None => format!("{text}{space}"),
                }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        });
        lines.collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
impl Output {
    /// As for a person, without colour.
    pub(crate) fn for_person() -> Self {
        Self {
            json: false,
            terminal: true,
            colour: false,
            error_colour: false,
            live: false,
        }
    }

    /// As for a pipe.
    pub(crate) fn for_pipe() -> Self {
        Self {
            terminal: false,
            ..Self::for_person()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_gets_plain_lines_and_a_person_columns() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec![
            (None, "web1".to_owned()),
            (Some(Style::Good), "running".to_owned()),
        ]);
        table.row(vec![(None, "a".to_owned()), (None, "lost".to_owned())]);
        assert_eq!(table.draw(&Output::for_pipe()), "web1\trunning\na\tlost");
        assert_eq!(
            table.draw(&Output::for_person()),
            "NAME  STATE\nweb1  running\na     lost"
        );
    }

    #[test]
    fn what_another_process_wrote_cannot_drive_the_terminal() {
        assert_eq!(printable("a\x1b[31mb\nc"), "a\u{fffd}[31mb\nc");
        let mut table = Table::new(&["A", "B"]);
        table.row(vec![
            (None, "x\ty\nz\x07".to_owned()),
            (None, "w".to_owned()),
        ]);
        assert_eq!(table.draw(&Output::for_pipe()), "x y z\u{fffd}\tw");
    }

    #[test]
    fn a_bar_is_as_full_as_it_should_be() {
        assert_eq!(bar(0, 10, 4), "");
        assert_eq!(bar(5, 10, 4), "██");
        assert_eq!(bar(10, 10, 4), "████");
        assert_eq!(bar(20, 10, 4), "████");
        assert_eq!(bar(0, 0, 4), "");
        assert_eq!(bar(1, 64, 8), "▏");
    }
}
