use super::*;
use crate::verify;

fn subject() -> Subject {
    Subject {
        vm: "web1".to_owned(),
        version: "0.1.0".to_owned(),
        host: "host".to_owned(),
        pid: 1,
    }
}

fn open(path: &Path, limits: Limits) -> AuditLog {
    AuditLog::open(path, subject(), limits).unwrap()
}

fn intact(path: &Path) -> verify::Verification {
    let found = verify::files("web1", &segments::all(path).unwrap(), &[]).unwrap();
    assert_eq!(found.findings, [], "{:?}", found.findings);
    found
}

const SMALL: Limits = Limits {
    segment: 4096,
    keep: 3,
};

#[test]
fn the_chain_goes_on_over_a_restart_and_a_torn_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, Limits::default());
    log.write(
        "open",
        &json!({"descriptor": ["kvm", 0], "path": "/dev/kvm"}),
    )
    .unwrap();
    log.write_synced("grant", &json!({"descriptor": "kvm", "id": 0, "uid": 7}))
        .unwrap();
    drop(log);
    let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
    torn.write_all(b"{\"torn").unwrap();
    let mut log = open(&path, Limits::default());
    log.reserve().unwrap();
    log.write("vm-end", &json!({"exit": "done"})).unwrap();
    let found = intact(&path);
    assert_eq!((found.records, found.first), (3, 0));
    assert_eq!(found.head, Some(log.checkpoint()));
}

#[test]
fn the_chain_goes_over_rotated_files_and_what_is_kept_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, SMALL);
    for turn in 0..40 {
        log.write("guest", &json!({"what": "x".repeat(100), "turn": turn}))
            .unwrap();
        if turn == 20 {
            log = open(&path, SMALL);
        }
    }
    let files = segments::all(&path).unwrap();
    assert_eq!(files.len(), 4, "{files:?}");
    for file in &files {
        assert!(fs::metadata(file).unwrap().len() < 6000);
    }
    let found = intact(&path);
    assert!(found.first > 0, "the oldest are gone");
    assert_eq!(found.head, Some(log.checkpoint()));
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"dropped_files\":[\"web1.jsonl.0"), "{text}");
}

#[test]
fn no_file_is_rotated_while_an_upgrade_has_space_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, SMALL);
    log.reserve().unwrap();
    for turn in 0..20 {
        log.write("guest", &json!({"turn": turn})).unwrap();
    }
    assert_eq!(segments::all(&path).unwrap().len(), 1);
    log.release();
    log.write("guest", &json!({})).unwrap();
    assert_eq!(segments::all(&path).unwrap().len(), 2);
    intact(&path);
}

#[test]
fn a_writer_that_died_as_it_rotated_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, Limits::default());
    log.write("guest", &json!({})).unwrap();
    let before = log.checkpoint();
    drop(log);
    // Between the two renames: the old file has its new name, the new one not yet.
    fs::rename(&path, segments::archived(&path, 0)).unwrap();
    fs::write(segments::unborn(&path), b"{\"half\"").unwrap();
    let mut log = open(&path, Limits::default());
    assert_eq!(log.checkpoint(), before);
    log.write("log-rotated", &json!({})).unwrap();
    assert_eq!(intact(&path).records, 2);
    assert!(!segments::unborn(&path).exists());
}

#[test]
fn a_log_that_cannot_rotate_goes_on_in_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, SMALL);
    // The new file's name is taken by what cannot be removed as a file.
    fs::create_dir(segments::unborn(&path)).unwrap();
    for turn in 0..30 {
        log.write("guest", &json!({"turn": turn})).unwrap();
    }
    assert_eq!(segments::all(&path).unwrap().len(), 1);
    assert_eq!(intact(&path).records, 30);
}

#[test]
fn opening_reads_the_end_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, Limits::default());
    log.write("guest", &json!({})).unwrap();
    drop(log);
    let last = fs::read(&path).unwrap();
    // 16 GiB that take no space lie before the last record: reading them all would not end.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(16 << 30).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"\n").unwrap();
    file.write_all(&last).unwrap();
    let log = AuditLog::open(&path, subject(), SMALL);
    // Its first line is no record, and that is said; but it was found at once.
    assert!(
        matches!(log, Ok(_) | Err(LogError::Foreign { .. })),
        "{log:?}"
    );
}

#[test]
fn what_is_no_log_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    for foreign in [
        "hello\n".to_owned(),
        format!("{}\n", "x".repeat(3 * MAX_RECORD)),
        "x".repeat(3 * MAX_RECORD),
    ] {
        fs::write(&path, &foreign).unwrap();
        let error = AuditLog::open(&path, subject(), SMALL).unwrap_err();
        assert!(error.to_string().contains("move the file aside"), "{error}");
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            foreign,
            "it is untouched"
        );
    }
}

#[test]
fn a_record_that_is_too_long_is_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, Limits::default());
    let error = log.write("guest", &json!({"what": "x".repeat(MAX_RECORD)}));
    assert!(matches!(error, Err(LogError::TooLong { .. })));
    log.write("guest", &json!({})).unwrap();
    assert_eq!(intact(&path).records, 1);
}

#[test]
fn a_flood_is_bounded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.jsonl");
    let mut log = open(&path, Limits::default());
    for _ in 0..10_000 {
        log.note("guest", &json!({}));
    }
    let lines = fs::read_to_string(&path).unwrap().lines().count();
    assert!(lines < 10_000, "{lines}");
    log.allowance = BURST;
    log.note("guest", &json!({}));
    assert!(fs::read_to_string(&path).unwrap().contains("unwritten"));
    intact(&path);
}
