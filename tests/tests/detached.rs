//! A detached VM holds nothing of whoever started it: not its standard streams, not its session, not its directory.

use baton_tests::Answer;
use baton_tests::Binaries;
use baton_tests::Site;

#[test]
fn its_starter_has_its_pipes_and_its_session_to_itself_again() {
    let site = Site::new(Binaries::release(), 10);
    let file = format!(
        "schema = 1\nname = \"{}\"\n[memory]\nsize = \"64M\"\n[boot]\nkernel = \"guest.elf\"\n",
        site.name
    );
    site.write("vm.toml", file);
    // Both pipes: this returns when nobody has them open any more.
    let output = site
        .command()
        .args(["run", "--detach"])
        .arg(site.path("vm.toml"))
        .output()
        .unwrap();
    let _started = Answer::of(&output).expect(0);
    let brokers = site.brokers();
    let [broker] = brokers.as_slice() else {
        panic!("one broker: {brokers:?}");
    };
    for fd in ["0", "1", "2"] {
        let target = std::fs::read_link(format!("/proc/{broker}/fd/{fd}")).unwrap();
        assert!(!target.starts_with("/dev/pts"), "{fd} leads to {target:?}");
    }
    // Of a leader outside this pid namespace the kernel says 0, which rustix takes for impossible; the file has it as it is.
    assert_eq!(
        session_of(&broker.to_string()),
        Some(*broker),
        "its own leader"
    );
    assert!(session_of("self").is_some_and(|ours| ours != *broker));
    site.baton(["stop", "--force", &site.name]).expect(0);
    site.assert_nothing_left();
}

/// The session of `process`, if it has the form of proc_pid_stat(5): the fourth field after its name.
fn session_of(process: &str) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(3)?.parse().ok()
}
