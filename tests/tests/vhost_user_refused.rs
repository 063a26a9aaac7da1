//! A process that should implement a device and answers nonsense, the wrong one, or none, harms nobody but its device.

use baton_guest::CommandLine;
use baton_guest::DriverState;
use baton_tests::Backend;
use baton_tests::Binaries;
use baton_tests::Builder;
use baton_tests::Qmp;
use baton_tests::Site;
use baton_tests::impostor::GET_CONFIG;
use baton_tests::impostor::GET_FEATURES;
use baton_tests::impostor::GET_PROTOCOL_FEATURES;
use baton_tests::impostor::GET_QUEUE_NUM;
use baton_tests::impostor::SET_VRING_ENABLE;
use baton_tests::impostor::impostor;
use baton_tests::impostor::reply;
use baton_tests::impostor::well_meant;
use baton_tests::until;
use serde_json::json;

const DISK: &str = "[[vhost_user]]\nid = \"data\"\nkind = \"blk\"\nsocket = \"d.sock\"\n";

/// A VM file with this, and these further lines of `[memory]`.
fn file(site: &Site, tables: &str, memory: &str) {
    let file = format!(
        "schema = 1\nname = \"{}\"\n[memory]\nsize = \"64M\"\n{memory}\n[boot]\nkernel = \"guest.elf\"\n{tables}",
        site.name
    );
    site.write("vm.toml", file);
}

fn refusal(site: &Site, code: i32) -> String {
    let refusal = site.run("vm.toml").expect(code);
    refusal.stdout + &refusal.stderr
}

#[test]
fn a_process_that_is_no_such_device_is_refused_by_what_is_wrong_with_it() {
    let site = Site::new(Binaries::release(), 10);
    file(&site, DISK, "");
    type Answer = fn(u32) -> Option<Vec<u8>>;
    let instead = |of: u32, bytes: fn() -> Vec<u8>| {
        move |request| {
            Some(if request == of {
                bytes()
            } else {
                well_meant(request)
            })
        }
    };
    let socket = site.path("d.sock");
    let hang_up: Answer = |_| None;
    impostor(&socket, hang_up);
    assert!(refusal(&site, 3).contains("vhost_user data: the process at"));
    for (of, bytes, expected) in [
        (
            GET_FEATURES,
            (|| reply(2, &[0; 8])) as fn() -> Vec<u8>,
            "a reply to request 2",
        ),
        (
            GET_FEATURES,
            || reply(1, &[0; 7]),
            "a reply to request 1 of 7 bytes",
        ),
        (GET_FEATURES, || vec![0xFF; 64], "with flags 0xffffffff"),
        (
            GET_FEATURES,
            || reply(1, &[0; 8]),
            "it has no protocol features",
        ),
        (
            GET_FEATURES,
            || reply(1, &(1_u64 << 30).to_le_bytes()),
            "it has no virtio 1",
        ),
        (
            GET_PROTOCOL_FEATURES,
            || reply(15, &[0; 8]),
            "it has no configuration to ask for",
        ),
        (
            GET_QUEUE_NUM,
            || reply(17, &[0; 8]),
            "it has 0 queues, the VM file wants 1",
        ),
        (
            GET_CONFIG,
            || reply(24, &[0; 12]),
            "a reply to request 24 of 12 bytes",
        ),
        (
            GET_CONFIG,
            || [well_meant(24), vec![0]].concat(),
            "1 bytes that nobody asked for",
        ),
        (GET_CONFIG, Vec::new, "it has not answered within 5s"),
    ] {
        impostor(&socket, instead(of, bytes));
        let said = refusal(&site, 3);
        assert!(
            said.contains("vhost_user data: ") && said.contains(expected),
            "{expected}: {said}"
        );
    }
    std::fs::remove_file(&socket).unwrap();
    assert!(refusal(&site, 3).contains("cannot connect to"));
    site.assert_nothing_left();
}

#[test]
fn who_may_not_have_the_guests_memory_is_not_given_it() {
    let site = Site::new(Binaries::release(), 10);
    impostor(&site.path("d.sock"), |_| None);
    // Of another user than the VM file says.
    file(&site, &format!("{DISK}user = 4711\n"), "");
    let said = refusal(&site, 30);
    assert!(said.contains("user 0 listens at"), "{said}");
    // Where policy does not say.
    let policy = site.write_policy(&[&site.binaries().worker()]);
    let granted = std::fs::read_to_string(&policy).unwrap();
    let (before, rest) = granted.split_once("name = \"vhost-user\"").unwrap();
    let rest = rest.replacen("\"/**\"", "\"/run/backends/*\"", 1);
    std::fs::write(&policy, format!("{before}name = \"vhost-user\"{rest}")).unwrap();
    file(&site, DISK, "");
    let text = std::fs::read_to_string(site.path("vm.toml")).unwrap();
    site.write(
        "vm.toml",
        format!("policy = {:?}\n{text}", policy.display().to_string()),
    );
    let said = refusal(&site, 30);
    assert!(
        said.contains("vhost_user data: policy") && said.contains("does not grant"),
        "{said}"
    );
    // Of memory that nobody shares.
    file(&site, DISK, "share = false");
    let said = refusal(&site, 3);
    assert!(
        said.contains("vhost_user with memory.share = false"),
        "{said}"
    );
    site.assert_nothing_left();
}

#[test]
fn a_process_that_speaks_unasked_breaks_its_device_and_nothing_else() {
    let vm = Builder::release()
        .line(CommandLine::new().disk_irq().console().period_ms(50))
        .tables(DISK)
        .start_in(|site| {
            impostor(&site.path("d.sock"), |request| {
                let nonsense = reply(request, b"and by the way");
                Some(if request == SET_VRING_ENABLE {
                    nonsense
                } else {
                    well_meant(request)
                })
            });
        });
    let before = vm.witness();
    until("a broken disk", || {
        (vm.ram.disk().state == DriverState::Broken).then_some(())
    });
    let _ = vm.assert_goes_on(&before);
    vm.assert_upgrades();
    let said = "vhost-user-blk[14.1]: the vhost-user backend: 26 bytes that nobody asked for";
    let log = vm.audit_log();
    assert!(
        log.of("worker-says")
            .any(|record| record.fields.to_string().contains(said)),
        "{log:?}"
    );
}

#[test]
fn a_guest_with_such_a_device_does_not_go_into_a_file() {
    let mut backend = None;
    let vm = Builder::release()
        .state_files()
        .tables(DISK)
        .start_in(|site| {
            let (image, socket) = (site.path("data.img"), site.path("d.sock"));
            backend = Some(Backend::storage_daemon(&image, 4, &socket));
        });
    let mut qmp = Qmp::connect(&vm);
    qmp.done("migrate-set-parameters", json!({"mode": "cpr-reboot"}));
    let blocked = "State blocked by non-migratable device 'vhost_user data'";
    let info = qmp.returns("query-migrate", json!({}));
    assert_eq!(info["blocked-reasons"], json!([blocked]));
    let uri = json!({"uri": format!("file:{}", vm.site.path("state").display())});
    assert!(qmp.refused("migrate", uri).starts_with(blocked));
    vm.assert_upgrades();
}
