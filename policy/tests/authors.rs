//! What people who write policies are promised: an error says where and what to do, a difference is one of meaning,
//! an explanation names the rule that decides.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use baton_policy::diff::{Difference, Direction};
use baton_policy::{BUILTIN, Policy, PolicyError, Problem, Syscall};

/// The built-in policy with one piece of its text replaced, which must be there exactly once.
#[track_caller]
fn edited(from: &str, to: &str) -> String {
    assert_eq!(BUILTIN.matches(from).count(), 1, "{from:?}");
    BUILTIN.replace(from, to)
}

#[track_caller]
fn refused(text: &str) -> PolicyError {
    Policy::parse(text, "test.toml").unwrap_err()
}

fn parsed(text: &str) -> Policy {
    Policy::parse(text, "test.toml").unwrap()
}

/// The text that the error's caret is under.
fn pointed(error: &PolicyError) -> String {
    let place = error.place.as_ref().unwrap();
    place
        .text
        .chars()
        .skip(place.column - 1)
        .take(place.width)
        .collect()
}

const YIELD: &str = r#"{ call = "sched_yield", why = "spinning politely" },"#;

#[test]
fn a_text_that_would_drive_a_terminal_does_not_parse() {
    // It erases the line above it on many a terminal, where `diff` may just have said what a build wants.
    let hostile = "\\u001b[2K\\u001b[1A and a reason";
    let reason = "why = \"what the guest boots, read once by the first worker\"";
    for (text, with) in [
        (reason, format!("why = \"{hostile}\"")),
        ("name = \"default\"", format!("name = \"{hostile}\"")),
    ] {
        assert!(BUILTIN.contains(text), "{text}");
        let error = Policy::parse(&BUILTIN.replacen(text, &with, 1), "test").unwrap_err();
        assert!(
            matches!(*error.problem, Problem::Control('\u{1b}')),
            "{error}"
        );
        assert!(!error.to_string().contains('\u{1b}'), "{error}");
    }
}

#[test]
fn a_rule_without_its_reason_does_not_parse() {
    let error = refused(&edited(YIELD, r#"{ call = "sched_yield" },"#));
    assert!(
        matches!(*error.problem, Problem::Toml(ref message) if message.contains("why")),
        "{error}"
    );
    for why in ["", "   ", "\\n", "ok"] {
        let error = refused(&edited(
            YIELD,
            &format!(r#"{{ call = "sched_yield", why = "{why}" }},"#),
        ));
        assert!(matches!(*error.problem, Problem::NoReason(_)), "{error}");
    }
}

#[test]
fn an_unknown_call_is_shown_with_its_line_a_caret_and_the_nearest_name() {
    let error = refused(&edited(
        YIELD,
        r#"{ call = "sched_yeld", why = "spinning politely" },"#,
    ));
    let line = BUILTIN
        .lines()
        .position(|line| line.contains(YIELD))
        .unwrap()
        + 1;
    let text = error.to_string();
    assert!(
        text.starts_with(&format!(
            "test.toml:{line}:14: no system call is called \"sched_yeld\"\n"
        )),
        "{text}"
    );
    assert!(text.contains("    { call = \"sched_yeld\""), "{text}");
    assert!(text.ends_with("= did you mean \"sched_yield\"?"), "{text}");
    let (source, caret) = (text.lines().nth(2).unwrap(), text.lines().nth(3).unwrap());
    assert_eq!(source.find("\"sched_yeld\""), caret.find('^'), "{text}");
    assert_eq!(pointed(&error), "\"sched_yeld\"");
}

#[test]
fn an_error_inside_a_condition_points_into_it() {
    let error = refused(&edited("option is PR_SET_NAME", "option is PR_SET_NAM"));
    assert!(matches!(*error.problem, Problem::Condition(_)));
    assert_eq!(pointed(&error), "PR_SET_NAM");
}

#[test]
fn a_rule_that_the_compiler_would_drop_is_refused() {
    // seccompiler keeps only the conditional one of these.
    let with = |more: &str| edited(YIELD, &format!("{YIELD}\n{more}"));
    for (first, second) in [
        (
            r#"{ call = "kill", why = "test only" },"#,
            r#"{ call = "kill", when = "sig is 0", why = "test only" },"#,
        ),
        (
            r#"{ call = "kill", when = "sig is 0", why = "test only" },"#,
            r#"{ call = "kill", why = "test only" },"#,
        ),
        (
            r#"{ call = "kill", why = "test only" },"#,
            r#"{ call = "kill", why = "test again" },"#,
        ),
    ] {
        let error = refused(&with(&format!("{first}\n{second}")));
        assert!(matches!(*error.problem, Problem::Overlap { .. }), "{error}");
    }
    let twice = r#"{ call = "kill", when = "sig in 0, SIGABRT", why = "test only" }, { call = "kill", when = "sig is 0", why = "test again" },"#;
    let error = refused(&with(twice));
    assert!(matches!(*error.problem, Problem::Twice { .. }), "{error}");
}

#[test]
fn what_the_build_phase_denies_cannot_be_given_later() {
    let topic = r#"
[[allow]]
topic = "a test"
to = ["vcpu"]
calls = [ { call = "CALL", why = "test only" } ]
"#;
    let error = refused(&(BUILTIN.to_owned() + &topic.replace("CALL", "uname")));
    assert!(
        matches!(*error.problem, Problem::NotInBuild { .. }),
        "{error}"
    );
    // The build phase has it, with a condition.
    let error = refused(&(BUILTIN.to_owned() + &topic.replace("CALL", "getsockopt")));
    assert!(
        matches!(*error.problem, Problem::NotInBuild { .. }),
        "{error}"
    );
}

#[test]
fn no_policy_crosses_the_bounds() {
    let topic = |to: &str, rule: &str| {
        format!(
            "{BUILTIN}\n[[allow]]\ntopic = \"a test\"\nto = {to}\ncalls = [ {{ {rule}, why = \"test only\" }} ]\n"
        )
    };
    let everywhere = r#"["build", "control", "vcpu", "io"]"#;
    for (to, rule) in [
        (r#"["build"]"#, r#"call = "socket""#),
        (r#"["build"]"#, r#"call = "memfd_create""#),
        (r#"["build"]"#, r#"call = "io_uring_setup""#),
        (
            r#"["build"]"#,
            r#"call = "ioctl", when = "request is FIONBIO""#,
        ),
        (r#"["build"]"#, r#"call = "fcntl", when = "cmd is F_SETFL""#),
        (
            r#"["build"]"#,
            r#"call = "mmap", when = "prot has PROT_EXEC""#,
        ),
        (
            r#"["vcpu"]"#,
            r#"call = "ioctl", when = "request is KVM_CREATE_VM""#,
        ),
        (
            r#"["control"]"#,
            r#"call = "seccomp", when = "op is SECCOMP_SET_MODE_FILTER and flags is 0""#,
        ),
        (everywhere, r#"call = "ptrace""#),
    ] {
        let error = refused(&topic(to, rule));
        assert!(
            matches!(*error.problem, Problem::Never { .. }),
            "{rule}: {error}"
        );
    }
}

#[test]
fn a_file_is_whole_and_has_nothing_else() {
    let cases = [
        ("schema = 1", "schema = 2", "schema 2 is not known"),
        ("schema = 1\n", "", "schema"),
        ("floor_abi = 6", "floor_abi = 5", "ABI 5 cannot be a floor"),
        ("headroom = 16", "headroom = 0", "nonzero"),
        ("headroom = 16", "headroom = 16\nsurprise = 1", "surprise"),
        ("cpu_headroom = \"unlimited\"", "cpu_headroom = -1", "-1"),
        (
            "cpu_headroom = \"unlimited\"",
            "cpu_headroom = \"much\"",
            "much",
        ),
        ("cpu_headroom = \"unlimited\" ", "# ", "cpu_headroom"),
        ("core = 0 ", "kore = 0 ", "kore"),
        ("core = 0 ", "core = -1 ", "-1"),
        ("core = 0 ", "nproc = 5\ncore = 0 ", "nproc"),
        ("first = 1_900_000_000", "first = 0", "no range of host ids"),
        (
            "count = 65_536",
            "count = 4_000_000_000",
            "no range of host ids",
        ),
        ("keep = []", "keep = [\"CAP_SYS_ADMINN\"]", "CAP_SYS_ADMINN"),
        (
            "digests = []",
            "digests = [\"sha256:00\"]",
            "not a SHA-256 digest",
        ),
        (
            "paths = [\"/dev/kvm\"]",
            "paths = [\"dev/kvm\"]",
            "absolute path pattern",
        ),
        (
            "[roles.io]\nviolation = \"trap\"\nwhy = \"a thread of the pool that serves disks and network\"",
            "",
            "[roles.io]",
        ),
        (
            "call = \"clone3\"\nerrno = \"ENOSYS\"",
            "call = \"clone3\"\nerrno = \"EWHAT\"",
            "EWHAT",
        ),
        ("call = \"clone3\"", "call = \"read\"", "refused"),
    ];
    for (from, to, expected) in cases {
        let error = refused(&edited(from, to));
        let text = error.to_string();
        assert!(text.contains(expected), "{from:?} -> {to:?}: {text}");
        assert!(text.starts_with("test.toml"), "{text}");
    }
}

#[test]
fn hostile_text_is_an_error_and_nothing_worse() {
    for text in [
        "",
        "\0",
        "schema",
        "schema = 1",
        "[[allow]]",
        "\u{feff}",
        "schema = 99999999999999999999",
        "a = [[[[[[[[",
    ] {
        assert!(Policy::parse(text, "test.toml").is_err(), "{text:?}");
    }
    // Cut anywhere.
    for end in (0..BUILTIN.len())
        .step_by(97)
        .filter(|end| BUILTIN.is_char_boundary(*end))
    {
        let text = BUILTIN.get(..end).unwrap();
        let complete = Policy::parse(text, "test.toml");
        if let Err(error) = complete {
            assert!(!error.to_string().is_empty());
        }
    }
    // Names of other scripts, and a line longer than a terminal.
    let long = "ü".repeat(5000);
    let error = refused(&edited(
        YIELD,
        &format!(r#"{{ call = "{long}", why = "test only" }},"#),
    ));
    assert!(
        error
            .to_string()
            .lines()
            .all(|line| line.chars().count() < 20_000)
    );
}

#[test]
fn reordering_and_rewording_are_no_difference() {
    let builtin = parsed(BUILTIN);
    let mut reversed = builtin.clone();
    reversed.rules.reverse();
    reversed.refusals.reverse();
    reversed.descriptors.reverse();
    assert!(Difference::between(&builtin, &reversed).is_empty());
    let reworded = parsed(&edited("spinning politely", "giving way"));
    assert!(Difference::between(&builtin, &reworded).is_empty());
    let split = parsed(&edited(
        "when = \"\"\"advice in\n        MADV_DONTNEED, MADV_FREE\"\"\" },",
        "when = \"advice is MADV_FREE\" },
    { call = \"madvise\", when = \"advice is MADV_DONTNEED\", why = \"the allocator\" },",
    ));
    assert!(Difference::between(&builtin, &split).is_empty());
}

#[test]
fn a_difference_says_which_way_it_goes_and_whether_another_thread_had_it() {
    let builtin = parsed(BUILTIN);
    // fallocate: control and I/O have it, vCPUs do not.
    let topic = "\n[[allow]]\ntopic = \"a test\"\nto = [\"vcpu\"]\ncalls = [ { call = \"fsync\", why = \"the test's reason\" } ]\n";
    let wider = parsed(&(BUILTIN.to_owned() + topic));
    let difference = Difference::between(&builtin, &wider);
    // A worker's privilege is the union over its threads.
    assert!(!difference.widens());
    assert_eq!(
        difference.to_string(),
        "widens vcpu: fsync with any arguments (the test's reason); another thread had it before\n"
    );
    let back = Difference::between(&wider, &builtin);
    assert!(!back.widens());
    assert_eq!(
        back.to_string(),
        "narrows vcpu: fsync with any arguments; another thread has it still\n"
    );

    // What only the build phase may is out of reach of the threads that run later.
    let topic = "\n[[allow]]\ntopic = \"a test\"\nto = [\"control\"]\ncalls = [ { call = \"madvise\", when = \"advice is MADV_DONTDUMP\", why = \"the test's reason\" } ]\n";
    assert!(Difference::between(&builtin, &parsed(&(BUILTIN.to_owned() + topic))).widens());

    let new = "\n[[allow]]\ntopic = \"a test\"\nto = [\"build\", \"io\"]\ncalls = [ { call = \"uname\", why = \"the test's reason\" } ]\n";
    let difference = Difference::between(&builtin, &parsed(&(BUILTIN.to_owned() + new)));
    assert_eq!(
        difference.to_string(),
        "widens build: uname with any arguments (the test's reason)\nwidens io: uname with any arguments (the test's reason)\n"
    );
}

#[test]
fn only_the_arguments_that_are_new_are_named() {
    let builtin = parsed(BUILTIN);
    let wider = parsed(&edited(
        "F_GETFD, F_SETFD, F_GETFL",
        "F_DUPFD, F_GETFD, F_SETFD, F_GETFL",
    ));
    let difference = Difference::between(&builtin, &wider);
    let widened: Vec<_> = difference
        .changes
        .iter()
        .map(|change| (change.subject.as_str(), change.what.as_str()))
        .collect();
    let what = "fcntl when cmd is F_DUPFD";
    assert_eq!(widened, [("build", what), ("control", what), ("io", what)]);
}

#[test]
fn every_table_is_compared() {
    let builtin = parsed(BUILTIN);
    let cases = [
        (
            "digests = []",
            format!("digests = [\"sha256:{}\"]", "0".repeat(64)),
            "workers",
        ),
        (
            "directory = \"/etc/baton/workers.d\"",
            "directory = \"/tmp\"".into(),
            "workers",
        ),
        (
            "[ids]",
            format!(
                "[[approve]]\nworker = \"{}\"\nwhy = \"a test\"\n[ids]",
                "0".repeat(64)
            ),
            "workers",
        ),
        ("count = 65_536", "count = 65_537".into(), "ids"),
        ("\"ipc\", ", String::new(), "namespaces"),
        ("headroom = 16", "headroom = 17".into(), "threads"),
        (
            "memory_headroom = 536_870_912",
            "memory_headroom = \"unlimited\"".into(),
            "cgroup",
        ),
        (
            "console_file = 67_108_864",
            "console_file = \"unlimited\"".into(),
            "io",
        ),
        ("core = 0 ", "core = 1 ".into(), "rlimits"),
        ("core = 0 ", "core = \"unlimited\" ".into(), "rlimits"),
        (
            "keep = []",
            "keep = [\"CAP_NET_ADMIN\"]".into(),
            "capabilities",
        ),
        (
            "kinds = [\"kvm\"]",
            "kinds = [\"kvm\", \"file\"]".into(),
            "descriptors",
        ),
        (
            "seals = [\"shrink\", \"grow\", \"seal\"]",
            "seals = [\"shrink\", \"grow\"]".into(),
            "descriptors",
        ),
        ("count = 1024", "count = 1025".into(), "descriptors"),
        (
            "paths = [\"/dev/kvm\"]",
            "paths = [\"/dev/kvm\", \"/dev/mem\"]".into(),
            "descriptors",
        ),
    ];
    for (from, to, subject) in cases {
        let difference = Difference::between(&builtin, &parsed(&edited(from, &to)));
        assert!(difference.widens(), "{from} -> {to}: {difference}");
        assert!(
            difference
                .changes
                .iter()
                .all(|change| change.subject == subject),
            "{difference}"
        );
        let back = Difference::between(&parsed(&edited(from, &to)), &builtin);
        assert!(
            back.changes
                .iter()
                .any(|change| change.direction == Direction::Narrows),
            "{from} -> {to}: {back}"
        );
    }
    let stricter = parsed(&edited(
        "violation = \"trap\"\nwhy = \"a thread that runs one vCPU\"",
        "violation = \"kill\"\nwhy = \"a thread that runs one vCPU\"",
    ));
    assert!(!Difference::between(&builtin, &stricter).widens());
    assert!(Difference::between(&stricter, &builtin).widens());
}

#[test]
fn an_explanation_names_who_may_and_what_stops_the_others() {
    let builtin = parsed(BUILTIN);
    let explain = |name: &str| {
        builtin
            .explain_call(Syscall::from_name(name).unwrap())
            .to_string()
    };
    let fsync = explain("fsync");
    assert!(
        fsync.contains("io       may, with any arguments: the guest's flush (line "),
        "{fsync}"
    );
    assert!(
        fsync.contains(
            "vcpu     may not: no rule lets it through; it raises SIGSYS and is not executed"
        ),
        "{fsync}"
    );
    let clone3 = explain("clone3");
    assert!(
        clone3.contains("build    gets ENOSYS: its flags lie in memory"),
        "{clone3}"
    );
    assert!(
        clone3.contains(
            "No policy may give build, control, vcpu, io it: a worker makes threads only"
        ),
        "{clone3}"
    );
    let ioctl = explain("ioctl");
    assert!(
        ioctl.contains("vcpu     may, when request is KVM_RUN: running the guest"),
        "{ioctl}"
    );
    // The line that it names is the rule's.
    let line = builtin
        .rules
        .iter()
        .find(|rule| rule.call.name() == "fsync")
        .unwrap()
        .line;
    assert!(BUILTIN.lines().nth(line - 1).unwrap().contains("\"fsync\""));
}

#[test]
fn the_whole_explanation_has_every_call_and_every_role() {
    let builtin = parsed(BUILTIN);
    let text = builtin.explain().to_string();
    for rule in &builtin.rules {
        assert!(
            text.lines()
                .any(|line| line.starts_with(&format!("{} ", rule.call))),
            "{}",
            rule.call
        );
    }
    for expected in [
        "Policy \"default\"",
        "CAP",
        "ram: memfd or file for read-write, up to 64, with the seals",
        "control",
        "●",
        "◐",
    ] {
        assert!(
            text.contains(expected) || expected == "CAP",
            "{expected} in {text}"
        );
    }
}

#[test]
fn a_dump_has_every_filter_and_is_the_same_each_time() {
    let policy = parsed(BUILTIN);
    let compiled = policy.compile().unwrap();
    let document = serde_json::to_value(policy.document(&compiled)).unwrap();
    assert_eq!(
        document,
        serde_json::to_value(policy.document(&policy.compile().unwrap())).unwrap()
    );
    for filter in compiled.filters() {
        let shown = &document["filters"][filter.role.name()][filter.index];
        assert_eq!(shown["sha256"], filter.program.digest().to_string());
        assert_eq!(
            shown["bytes"].as_str().unwrap().len(),
            filter.program.as_bytes().len() * 2
        );
    }
    let text = compiled.disassemble();
    assert_eq!(
        text.matches("instructions, sha256").count(),
        compiled.filters().count()
    );
}

#[test]
fn the_builtin_policy_is_fit_and_its_advice_is_about_what_is_open() {
    let fitness = baton_policy::check::policy(&parsed(BUILTIN)).unwrap();
    let subjects: Vec<&str> = fitness
        .advice
        .iter()
        .map(|advice| advice.subject.as_str())
        .collect();
    assert!(
        subjects.contains(&"workers")
            && subjects.contains(&"ids")
            && subjects.contains(&"descriptor")
    );
    assert!(!subjects.contains(&"capabilities") && !subjects.contains(&"namespaces"));
    for (role, instructions) in fitness.instructions {
        assert!(
            (100..4096).contains(&instructions),
            "{role}: {instructions}"
        );
    }
}

#[test]
fn a_grant_of_every_pci_device_is_pointed_out_and_one_of_a_slot_is_not() {
    let warns = |paths: &str| {
        let policy = parsed(&edited("paths = []", &format!("paths = [{paths}]")));
        let advice = baton_policy::check::policy(&policy).unwrap().advice;
        (advice.iter()).any(|advice| advice.what.contains("every PCI device"))
    };
    for all in ["/**", "/sys/**", "/sys/bus/pci/devices/0000:*"] {
        assert!(warns(&format!("\"{all}\"")), "{all}");
    }
    assert!(!warns(""));
    assert!(!warns(
        "\"/sys/bus/pci/devices/0000:3b:*\", \"/sys/bus/pci/devices/0000:3c:00.1\""
    ));
}

#[test]
fn another_key_is_wider_and_what_is_no_key_points_at_itself() {
    let table = |key: &str| {
        let entry = format!("\n[[workers.key]]\nminisign = \"{key}\"\nwhy = \"a test\"\n\n[ids]");
        edited("\n[ids]", &entry)
    };
    let key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    let (none, one) = (parsed(BUILTIN), parsed(&table(key)));
    let difference = Difference::between(&none, &one);
    assert!(difference.widens());
    assert_eq!(
        difference.to_string(),
        format!("widens workers: what the key {key} has signed may run\n")
    );
    assert!(!Difference::between(&one, &none).widens());
    let error = refused(&table(&key[1..]));
    assert!(
        error.to_string().contains("no minisign public key"),
        "{error}"
    );
    assert_eq!(pointed(&error), format!("\"{}\"", &key[1..]));
    let unreasoned = table(key).replace("why = \"a test\"", "why = \" \"");
    refused(&unreasoned);
}
