//! What the sides have of the host besides the guest: sockets, disks, taps, memory, devices that came while it ran.

use crate::failures::PERHAPS_INCOMING;
use crate::failures::RETURN_PATH;
use crate::failures::RETURN_PATH_THERE;
use crate::pair::Pair;
use crate::pair::differs;
use crate::pair::same;
use crate::pairs::CPR;
use crate::pairs::HOLD;
use crate::pairs::INCOMING;
use crate::pairs::MIGRATE;
use crate::pairs::OLD;
use crate::party::New;

const QUIT: &str = "perhaps old quit {}";

pub(crate) const RESOURCES: &[Pair] = &[
    differs(
        "somebody listens to the serial port",
        New::OneSocket,
        &[
            CPR,
            "somebody listens to the serial port",
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            QUIT,
            "old has ended",
            "the listener",
        ],
        "done; done; done; old completed; new running; the listener stays",
        "who listens goes over with the guest",
    ),
    differs(
        "both listen at one path, and the old side quits",
        New::OneSocket,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            "the socket of both",
            QUIT,
            "old has ended",
            "the socket of both",
        ],
        "done; done; done; old completed; new running; it is there; it is there",
        "QEMU removes the other side's socket",
    ),
    same(
        "both under a sandbox",
        New::Sandboxed,
        &[CPR, MIGRATE, INCOMING, "old settles", OLD, "new has it"],
    ),
    differs(
        "a device was added, and there it was not",
        New::Port,
        &[
            "old gets a device",
            CPR,
            RETURN_PATH,
            MIGRATE,
            RETURN_PATH_THERE,
            PERHAPS_INCOMING,
            "old settles",
            OLD,
        ],
        r#"done; done; done; old completed; "postmigrate""#,
        "it goes over with its guest; QEMU's user has to add it on the other side, too",
    ),
    // (A QEMU that interprets a guest may not answer at all when it refuses a device, but for one that stands still.)
    same(
        "while the other side is awaited: device_add, device_del",
        New::Port,
        &[
            "old gets a device",
            "old stop {}",
            CPR,
            MIGRATE,
            r#"old device_del {"id": "x"}"#,
            r#"old device_add {"driver": "virtio-blk-pci", "id": "y", "drive": "m"}"#,
        ],
    ),
    differs(
        "a disk that both have, and cont on the old side, afterwards",
        New::OneDisk,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            "old cont {}",
            OLD,
        ],
        r#"done; done; done; old completed; new running; GenericError: the VM was handed to another broker, so `resume` is not possible (`baton status` shows its state); "postmigrate""#,
        "QEMU has nothing but the disk's lock to keep it from running the guest twice",
    ),
    differs(
        "a tap that both have",
        New::OneTap,
        &[
            CPR,
            MIGRATE,
            PERHAPS_INCOMING,
            "old settles",
            OLD,
            "new lives",
        ],
        r#"done; done; old completed; "postmigrate"; new lives"#,
        "QEMU cannot open it twice",
    ),
    differs(
        "what the old side has of the guest, afterwards",
        New::Deferred,
        &[
            CPR,
            MIGRATE,
            INCOMING,
            "old settles",
            "new has it",
            "the old side's memory",
        ],
        "done; done; done; old completed; new running; old has nothing of it",
        "its worker was killed; QEMU's process keeps all of it until it quits",
    ),
    // Without a return path QEMU's old side has completed or failed, whichever of the two is faster; frozen, the new one is slower.
    differs(
        "a machine that lacks a device, slow to say so",
        New::FewerDevices,
        &[
            CPR,
            HOLD,
            MIGRATE,
            PERHAPS_INCOMING,
            "old is held, or has failed",
            "new is frozen",
            r#"perhaps old migrate-continue {"state": "pre-switchover"}"#,
            "old settles",
            OLD,
            "new is thawed",
            "new lives",
            OLD,
        ],
        r#"done; done; done; old failed; "running"; new has ended; "running""#,
        "QEMU's guest runs nowhere then",
    ),
];
