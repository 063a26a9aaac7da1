//! `docs/qemu-compat.md` has a row for everything that QEMU does, and the tests that it names exist.
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

fn exists(test: &str) -> bool {
    let (file, name) = test.rsplit_once("::").unwrap();
    let path = if file.contains('/') {
        format!("{file}.rs")
    } else {
        format!("tests/tests/{file}.rs")
    };
    read(&path).contains(&format!("#[test]\nfn {name}()"))
}

#[test]
fn every_row_has_a_verdict_and_a_test_that_exists() {
    let document = read("docs/qemu-compat.md");
    let rows: Vec<Vec<&str>> = document
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| #"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
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
