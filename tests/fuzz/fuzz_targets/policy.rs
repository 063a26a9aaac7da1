//! A policy file.
//!
//! What is promised: no panic, and no time without a bound; an error points into the text; what parses compiles, unless it is too
//! long for the kernel, the same twice; it permits what it permits, and its lints are of its own lines. Input: the text.
#![no_main]

use baton_policy::Policy;
use baton_policy::diff::Difference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let policy = match Policy::parse(text, "fuzzed") {
        Ok(policy) => policy,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let lines = text.lines().count();
    assert!(
        policy
            .lint()
            .iter()
            .all(|lint| lint.line.is_none_or(|line| line <= lines))
    );
    assert!(!Difference::between(&policy, &policy).widens());
    let _ = policy.explain().to_string();
    if let Ok(compiled) = policy.compile() {
        assert_eq!(compiled, policy.compile().unwrap());
    }
});
