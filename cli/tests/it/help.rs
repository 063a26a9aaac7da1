//! The help that a person sees first: changed on purpose or not at all.

use std::process::Stdio;

use crate::canned::*;

#[test]
fn the_top_level_help_is_the_one_that_was_reviewed() {
    let dir = tempfile::tempdir().unwrap();
    let output = baton(dir.path(), &["--help"])
        .stdin(Stdio::null())
        .env("COLUMNS", "100")
        .output()
        .unwrap();
    assert_eq!(code(&output), 0);
    let reviewed = include_str!("help.txt");
    assert_eq!(
        stdout(&output),
        reviewed,
        "review it, then: baton --help > cli/tests/it/help.txt"
    );
}
