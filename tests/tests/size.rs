//! What goes over in the pause has nothing to do with how much memory the guest has.

use baton_guest::CommandLine;
use baton_tests::Builder;

#[test]
fn the_state_of_four_gib_is_no_larger_than_that_of_64_mib() {
    let bytes = |size: &str| {
        // It prints nothing: what the console has not taken yet is state, too.
        let line = CommandLine::new().walk_bytes(1 << 20).period_ms(20);
        let vm = Builder::release().memory(size).line(line).start();
        vm.assert_upgrades().state_bytes
    };
    let (small, large) = (bytes("64M"), bytes("4G"));
    // Numbers are encoded in as many bytes as they need, so two states differ by a few.
    assert!(
        small.abs_diff(large) < 64,
        "{small} bytes at 64M, {large} at 4G"
    );
}
