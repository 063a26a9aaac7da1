//! `docs/qemu-compat.md` has a row for everything that QEMU does, `docs/upgrade-rules.md` one for every rule, and the tests that
//! they name exist, as do the questions to a real QEMU.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot do its work fails"
)]

use std::collections::BTreeSet;
use std::path::Path;

/// The sections of the checklist, and how many rows each has.
const ROWS: [(char, usize); 8] = [
    ('A', 7),
    ('B', 8),
    ('C', 14),
    ('D', 12),
    ('E', 7),
    ('F', 7),
    ('G', 14),
    ('H', 6),
];

/// The inputs that are refused and the failures that are known of QEMU, and what its users complain of.
const INPUTS: usize = 78;
const COMPLAINTS: usize = 23;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The cells of each row of a document's table.
fn rows(document: &str) -> Vec<Vec<&str>> {
    document
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| #"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

fn exists(test: &str) -> bool {
    let (file, name) = test.rsplit_once("::").unwrap();
    let path = if file.contains('/') {
        format!("{file}.rs")
    } else {
        format!("tests/tests/{file}.rs")
    };
    let text = read(&path);
    // Written out, or a row of a macro's table.
    let written = [format!("fn {name}()"), format!("{name}: \"")];
    text.contains("#[test]") && written.iter().any(|one| text.contains(one))
}

/// The rows of a section.
fn section<'a>(document: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let (_, rest) = document.split_once(heading).unwrap();
    let end = rest.find("\n## ").unwrap_or(rest.len());
    rows(&rest[..end])
}

/// What is in this cell between marks of this kind.
fn marked(cell: &str, mark: char) -> Vec<&str> {
    let parts: Vec<&str> = cell.split(mark).collect();
    assert!(parts.len() % 2 == 1, "{cell} lacks a {mark}");
    parts.into_iter().skip(1).step_by(2).collect()
}

/// The names of the questions that the oracle asks.
fn questions() -> BTreeSet<String> {
    let literal = |line: &str| {
        let line = line.trim_start();
        // A flow's or a case's first argument, by itself in its line or behind its function.
        let line = match line.split_once('(') {
            Some((name, rest))
                if ["same", "differs", "with_capability!", "greeted"].contains(&name) =>
            {
                rest
            }
            _ => line,
        };
        let name = line.strip_prefix('"')?.split('"').next()?;
        Some(name.to_owned())
    };
    let files = [
        "cases",
        "pairs",
        "failures",
        "resources",
        "run_states",
        "starts",
    ];
    files
        .iter()
        .flat_map(|file| {
            let text = read(&format!("tests/tests/oracle/{file}.rs"));
            text.lines().filter_map(literal).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn every_row_has_a_verdict_a_test_that_exists_and_questions_that_are_asked() {
    let document = read("docs/qemu-compat.md");
    let questions = questions();
    let checklist = ROWS
        .iter()
        .flat_map(|(section, count)| (1..=*count).map(move |number| format!("{section}{number}")));
    let numbered =
        |section: char, count: usize| (1..=count).map(move |number| format!("{section}{number}"));
    let tables: [(&str, Vec<String>); 3] = [
        ("## What there is\n", checklist.collect()),
        (
            "## What is refused, and what fails\n",
            numbered('R', INPUTS).collect(),
        ),
        (
            "## What QEMU's users complain of\n",
            numbered('L', COMPLAINTS).collect(),
        ),
    ];
    let mut asked = 0;
    for (heading, expected) in tables {
        let rows = section(&document, heading);
        let found: Vec<&str> = rows.iter().map(|row| row[0]).collect();
        assert_eq!(found, expected, "{heading}");
        for row in &rows {
            let [id, .., verdict, how, test, oracle] = row[..] else {
                panic!("{row:?} has too few columns");
            };
            match verdict {
                "same" | "better" | "refused" => {
                    let tests = marked(test, '`');
                    assert!(!tests.is_empty(), "{id} names no test");
                    for test in tests {
                        assert!(exists(test), "{id} names a test that is not there: {test}");
                    }
                }
                "n/a" | "absent" => assert!(!how.is_empty(), "{id} says no reason"),
                other => panic!("{id} has the verdict {other:?}"),
            }
            assert!(verdict != "better" || !how.is_empty(), "{id} says not how");
            for question in marked(oracle, '"') {
                assert!(
                    questions.contains(question),
                    "{id}: nobody asks {question:?}"
                );
                asked += 1;
            }
        }
    }
    assert!(asked > 100, "{asked}");
}

#[test]
fn every_rule_of_an_upgrade_has_tests_that_exist() {
    let document = read("docs/upgrade-rules.md");
    let rows = rows(&document);
    let numbers: Vec<String> = rows.iter().map(|row| row[0].to_owned()).collect();
    let expected: Vec<String> = (1..=rows.len()).map(|number| number.to_string()).collect();
    assert!(rows.len() >= 13, "{numbers:?}");
    assert_eq!(numbers, expected);
    for row in rows {
        let tests: Vec<&str> = row[2]
            .split('`')
            .filter(|part| part.contains("::"))
            .collect();
        assert!(!tests.is_empty(), "rule {} names no test", row[0]);
        for test in tests {
            assert!(
                exists(test),
                "rule {} names a test that is not there: {test}",
                row[0]
            );
        }
    }
}

#[test]
fn every_fuzz_target_has_a_corpus_to_begin_with_and_qmps_has_the_whole_front() {
    let manifest = read("tests/fuzz/Cargo.toml");
    let (_, targets) = manifest.split_once("[[bin]]").unwrap();
    let targets: Vec<&str> = targets
        .lines()
        .filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'))
        .collect();
    assert!(targets.len() >= 8, "{targets:?}");
    for target in targets {
        read(&format!("tests/fuzz/fuzz_targets/{target}.rs"));
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/seeds/{target}"));
        assert!(std::fs::read_dir(&seeds).unwrap().count() > 0, "{target}");
    }
    // Nothing builds that target but a run of it. It takes all but what serves and what documents.
    let front = read("cli/src/bin/baton-qmp/main.rs");
    let target = read("tests/fuzz/fuzz_targets/qmp.rs");
    for module in front.lines().filter_map(|line| line.strip_prefix("mod ")) {
        let module = module.trim_end_matches(';');
        let there = target.contains(&format!("baton-qmp/{module}.rs"));
        assert!(
            there || ["document", "front"].contains(&module),
            "{module} is missing"
        );
    }
}
