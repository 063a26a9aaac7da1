//! An audit log that somebody has had in his hands.
//!
//! What is promised: no panic, a bounded number of findings; a log without a finding has none when it is read again, and has one
//! when a byte of any record but the last is changed. Input: a byte that says which, and the log.
#![no_main]

use baton_audit::verify;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&which, log)) = data.split_first() else {
        return;
    };
    let verified = verify::bytes("fuzzed", log, &[]);
    let _ = verified.document();
    assert!(
        verified
            .findings
            .iter()
            .all(|finding| !finding.to_string().is_empty())
    );
    if !verified.findings.is_empty() {
        return;
    }
    let last = log.iter().rev().skip(1).position(|byte| *byte == b'\n');
    let Some(end) = last.map(|from_end| log.len() - from_end - 2) else {
        return;
    };
    let at = usize::from(which) * 257 % end;
    let mut changed = log.to_vec();
    changed[at] ^= 1;
    assert!(!verify::bytes("fuzzed", &changed, &[]).findings.is_empty());
});
