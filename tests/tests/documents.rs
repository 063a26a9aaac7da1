//! `docs/qemu-compat.md` has a row for everything that QEMU does, `docs/upgrade-rules.md` one for every rule, and the tests that
//! they name exist.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot do its work fails"
)]

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

#[test]
fn every_row_has_a_verdict_and_a_test_that_exists() {
    let document = read("docs/qemu-compat.md");
    let rows = rows(&document);
    let expected: Vec<String> = ROWS
        .iter()
        .flat_map(|(section, count)| (1..=*count).map(move |number| format!("{section}{number}")))
        .collect();
    let found: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    assert_eq!(found, expected);
    for row in &rows {
        let [id, _, verdict, how, test] = row[..] else {
            panic!("{row:?} has not five columns");
        };
        match verdict {
            "same" | "better" | "refused" => {
                let test = test.trim_matches('`');
                assert!(exists(test), "{id} names a test that is not there: {test}");
            }
            "n/a" | "absent" => assert!(!how.is_empty(), "{id} says no reason"),
            other => panic!("{id} has the verdict {other:?}"),
        }
    }
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
