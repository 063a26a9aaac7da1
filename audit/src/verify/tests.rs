use proptest::prelude::*;

use super::*;
use crate::AuditLog;
use crate::Limits;
use crate::shape::Subject;

/// A log of so many records, as its writer writes it.
fn log(records: usize) -> (Vec<u8>, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let subject = Subject {
        vm: "web1".to_owned(),
        version: "0.1.0".to_owned(),
        host: "host".to_owned(),
        pid: 1,
    };
    let mut log = AuditLog::open(&path, subject, Limits::default()).unwrap();
    for turn in 0..records {
        log.write("guest", &json!({"turn": turn})).unwrap();
    }
    (std::fs::read(&path).unwrap(), log.checkpoint())
}

fn lines(log: &[u8]) -> Vec<Vec<u8>> {
    log.split_inclusive(|&byte| byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect()
}

fn found(log: &[u8]) -> Vec<What> {
    let verification = bytes("web1", log, &[]);
    verification
        .findings
        .into_iter()
        .map(|finding| finding.what)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_changed_byte_is_found_and_its_record_named(record in 0..9_usize, at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut lines = lines(&log(10).0);
        let line = &mut lines[record];
        let at = at.index(line.len());
        line[at] ^= 1 << bit;
        let verification = bytes("web1", &lines.concat(), &[]);
        let first = verification.findings.first().expect("a changed byte is found");
        // The line itself, or, where its number or its end was changed, the one after it.
        let place = first.place.clone().unwrap().line;
        let number = record as u64 + 1;
        prop_assert!((number..=number + 1).contains(&place), "{first} for record {record}");
    }

    #[test]
    fn a_removed_run_is_found_and_named(from in 1..8_usize, length in 1..3_usize) {
        let mut lines = lines(&log(12).0);
        lines.drain(from..from + length);
        prop_assert_eq!(found(&lines.concat()), [What::Removed { from: from as u64, to: (from + length - 1) as u64 }]);
    }

    #[test]
    fn a_moved_record_is_found_and_named(from in 0..9_usize, to in 0..9_usize) {
        prop_assume!(from != to);
        let mut lines = lines(&log(10).0);
        let line = lines.remove(from);
        lines.insert(to, line);
        let what = found(&lines.concat());
        prop_assert!(!what.is_empty());
        prop_assert!(what.iter().all(|what| matches!(what, What::Reordered { .. })), "{:?}", what);
    }

    #[test]
    fn any_bytes_are_verified_without_a_panic(log in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = bytes("web1", &log, &[]);
    }
}

#[test]
fn an_intact_log_has_no_findings() {
    let (log, checkpoint) = log(10);
    let verification = bytes("web1", &log, std::slice::from_ref(&checkpoint));
    assert_eq!(verification.findings, []);
    assert_eq!(verification.head, Some(checkpoint));
    assert_eq!(verification.records, 10);
    assert_eq!(bytes("web1", b"", &[]).findings, []);
}

#[test]
fn an_edit_is_blamed_on_the_record_that_was_edited() {
    let (log, _) = log(10);
    let text = String::from_utf8(log).unwrap();
    let edited = text.replace("\"turn\":4", "\"turn\":5");
    assert_eq!(found(edited.as_bytes()), [What::Edited { sequence: 4 }]);
    // Also when it is its link that was changed, so that the record before it seems to be another.
    let mut lines = lines(text.as_bytes());
    let other = Digest::of(b"another").to_string();
    let line = String::from_utf8(lines[4].clone()).unwrap();
    let prev = Link::parse(line.trim_end().as_bytes()).unwrap().previous;
    lines[4] = line.replace(&prev.to_string(), &other).into_bytes();
    assert_eq!(found(&lines.concat()), [What::Edited { sequence: 4 }]);
}

#[test]
fn the_beginning_that_was_removed_is_missed() {
    let lines = lines(&log(5).0);
    assert_eq!(
        found(&lines[2..].concat()),
        [What::Removed { from: 0, to: 1 }]
    );
}

#[test]
fn a_record_that_is_there_twice_is_found() {
    let mut lines = lines(&log(5).0);
    lines.insert(3, lines[2].clone());
    assert_eq!(found(&lines.concat()), [What::Repeated { sequence: 2 }]);
}

#[test]
fn a_line_that_is_cut_short_is_found() {
    let (log, _) = log(3);
    let cut = &log[..log.len() - 7];
    assert!(matches!(found(cut).as_slice(), [What::CutShort { .. }]));
}

#[test]
fn a_garbled_line_is_one_finding() {
    let mut lines = lines(&log(5).0);
    lines[2] = b"garbage\n".to_vec();
    assert!(matches!(
        found(&lines.concat()).as_slice(),
        [What::Malformed { .. }]
    ));
    lines[2] = [vec![b'x'; 3 * MAX_RECORD], b"\n".to_vec()].concat();
    assert!(matches!(
        found(&lines.concat()).as_slice(),
        [What::Malformed { .. }]
    ));
}

#[test]
fn a_checkpoint_shows_what_the_chain_cannot() {
    let (whole, checkpoint) = log(10);
    let ended = lines(&whole)[..7].concat();
    assert_eq!(found(&ended), [], "the chain ends in good order");
    let what = |log: &[u8], checkpoint: &Checkpoint| {
        let verification = bytes("web1", log, std::slice::from_ref(checkpoint));
        let mut findings = verification.findings.into_iter();
        findings.next().map(|finding| finding.what)
    };
    let (found, expected) = (7, 10);
    assert_eq!(
        what(&ended, &checkpoint),
        Some(What::EndRemoved { found, expected })
    );
    // Written anew as a whole, a moment later or with other fields.
    let mut anew = String::from_utf8(whole.clone()).unwrap();
    anew = anew.replace("\"turn\":9", "\"turn\":8");
    assert_eq!(
        what(anew.as_bytes(), &checkpoint),
        Some(What::Rewritten { sequence: 9 })
    );
    let other = Checkpoint {
        vm: "web2".to_owned(),
        ..checkpoint.clone()
    };
    let vm = "web2".to_owned();
    assert_eq!(what(&whole, &other), Some(What::OtherVm { vm }));
    assert_eq!(what(&whole, &checkpoint), None);
}
