//! Where the guest puts what it reports, and the words of its command line: one file, compiled into both the guest
//! program and the host-side library, so that they cannot disagree.
//!
//! All numbers are little-endian `u64` words. Offsets of the header are in bytes from [`REPORT_ADDRESS`], offsets of a
//! vCPU's slot in bytes from [`slot_offset`]. Times are in TSC ticks of the guest.

/// Guest-physical address of the report, in bytes. Between the end of conventional low memory and the image, so that
/// neither boot parameters, tables nor a reload of the image overwrite it.
pub const REPORT_ADDRESS: u64 = 0x10_0000;
/// Length of the report, in bytes: a header page and a page of slots.
pub const REPORT_SIZE: usize = 0x2000;
/// First byte of the image, in guest-physical bytes (`link.ld`).
pub const IMAGE_ADDRESS: u64 = 0x20_0000;
/// Where the zero page is when there is no firmware, in guest-physical bytes.
pub const BARE_ZERO_PAGE: u64 = 0x7000;
/// First guest-physical byte that the memory walker touches; the image ends and the vCPUs' stacks end below it.
pub const WALK_ADDRESS: u64 = 0x40_0000;
/// Guest-physical page that holds the start-up code of the other vCPUs, in bytes. Written before they are started,
/// after the boot parameters have been read.
pub const TRAMPOLINE_ADDRESS: u64 = 0x8_0000;
/// The most vCPUs that the guest drives.
pub const MAX_VCPUS: usize = 8;
/// Page size of the walker, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// First word of the header: the bytes `BatonGst`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"BatonGst");
/// Version of this layout.
pub const VERSION: u64 = 1;

/// Header: [`MAGIC`], written last when the guest has booted.
pub const MAGIC_OFFSET: usize = 0x00;
/// Header: [`VERSION`].
pub const VERSION_OFFSET: usize = 0x08;
/// Header: a number chosen at boot from the TSC; never zero.
pub const NONCE_OFFSET: usize = 0x10;
/// Header: how often the guest booted since this RAM was blank; 1 after a cold boot.
pub const BOOTS_OFFSET: usize = 0x18;
/// Header: vCPUs that the command line asked for.
pub const VCPUS_OFFSET: usize = 0x20;
/// Header: vCPUs that run.
pub const VCPUS_RUNNING_OFFSET: usize = 0x28;
/// Header: TSC frequency that the guest counts with, in kHz.
pub const TSC_KHZ_OFFSET: usize = 0x30;
/// Header: where that frequency came from ([`TSC_FROM_COMMAND_LINE`] and kin).
pub const TSC_SOURCE_OFFSET: usize = 0x38;
/// Header: a gap counts as one from this many ticks.
pub const GAP_TICKS_OFFSET: usize = 0x40;
/// Header: bytes that the walker covers, over all vCPUs.
pub const WALK_BYTES_OFFSET: usize = 0x48;
/// Header: status lines printed.
pub const LINES_OFFSET: usize = 0x50;
/// Header: line of the program at which it panicked, 0 if it did not.
pub const PANIC_OFFSET: usize = 0x58;
/// Header: TSC at boot.
pub const BOOT_TSC_OFFSET: usize = 0x60;
/// Header: how often the gap statistics were cleared.
pub const CLEARS_OFFSET: usize = 0x68;
/// Header: mailbox. The host writes a command's number (`COMMAND_*`); the guest does it and writes 0.
pub const MAILBOX_OFFSET: usize = 0x80;

/// [`TSC_SOURCE_OFFSET`]: nobody said; [`TSC_ASSUMED_KHZ`].
pub const TSC_ASSUMED: u64 = 0;
/// [`TSC_SOURCE_OFFSET`]: `tsc_khz=` on the command line.
pub const TSC_FROM_COMMAND_LINE: u64 = 1;
/// [`TSC_SOURCE_OFFSET`]: CPUID leaf 0x4000_0010 (EAX, kHz; VMware's timing leaf, which KVM guests use too).
pub const TSC_FROM_HYPERVISOR: u64 = 2;
/// [`TSC_SOURCE_OFFSET`]: CPUID leaf 0x15 (crystal Hz in ECX times EBX over EAX; Intel SDM, volume 2A).
pub const TSC_FROM_CRYSTAL: u64 = 3;
/// Frequency counted with when nobody says, in kHz.
pub const TSC_ASSUMED_KHZ: u64 = 2_000_000;

/// State of a device: it is driven.
pub const DRIVER_WORKING: u64 = 1;
/// State of a device: nothing is under way, and nothing is begun.
pub const DRIVER_RESTING: u64 = 2;
/// State of a device: none was found.
pub const DRIVER_ABSENT: u64 = 3;
/// State of a device: it refuses what every driver needs.
pub const DRIVER_REFUSED: u64 = 4;
/// State of a device: it says that it needs a reset.
pub const DRIVER_BROKEN: u64 = 5;

/// Header: how far the guest is with its disk ([`DRIVER_WORKING`] and kin), with `disk`.
pub const DISK_STATE_OFFSET: usize = 0x100;
/// Header: requests that the disk has completed.
pub const DISK_DONE_OFFSET: usize = 0x108;
/// Header: requests that the disk said had failed.
pub const DISK_ERRORS_OFFSET: usize = 0x110;
/// Header: blocks that were read back as something else.
pub const DISK_WRONG_OFFSET: usize = 0x118;
/// Header: completions of requests that were not under way.
pub const DISK_EXTRA_OFFSET: usize = 0x120;
/// Header: requests under way.
pub const DISK_FLYING_OFFSET: usize = 0x128;
/// Header: interrupts of the disk, with `disk_irq`.
pub const DISK_INTERRUPTS_OFFSET: usize = 0x130;
/// Header: blocks that each lane has.
pub const DISK_LANE_BLOCKS_OFFSET: usize = 0x138;
/// Header: the disk's size in bytes, read again at each of its configuration interrupts, with `disk_irq`.
pub const DISK_BYTES_OFFSET: usize = 0x140;
/// Header: the disk's configuration interrupts, with `disk_irq`.
pub const DISK_CHANGES_OFFSET: usize = 0x148;
/// Header: devices that have come, with `hotplug`.
pub const HOTPLUG_CAME_OFFSET: usize = 0x150;
/// Header: devices that it has let go, with `hotplug`.
pub const HOTPLUG_WENT_OFFSET: usize = 0x158;
/// Header: the disk's block size in bytes, read when its size is.
pub const DISK_BLOCK_SIZE_OFFSET: usize = 0x160;
/// Header: the number of the last block that a lane has written.
#[must_use]
pub const fn disk_lane_offset(lane: usize) -> usize {
    0x200 + lane * 8
}
/// Lanes: requests that are under way at once.
pub const DISK_LANES: usize = 32;
/// The most blocks that a lane writes.
pub const DISK_LANE_BLOCKS: u64 = 64;
/// Bytes of a block.
pub const DISK_BLOCK: u64 = 4096;

/// A word of the block of that number of a lane: no two blocks have one in common.
#[must_use]
pub const fn disk_word(lane: u64, number: u64, nonce: u64, word: u64) -> u64 {
    seal(lane << 32 | word, number, nonce)
}

/// Header: how far the guest is with its network interface ([`DRIVER_WORKING`] and kin), with `net`.
pub const NET_STATE_OFFSET: usize = 0x300;
/// Header: frames sent.
pub const NET_SENT_OFFSET: usize = 0x308;
/// Header: number of the last frame received.
pub const NET_RECEIVED_OFFSET: usize = 0x310;
/// Header: numbers before it that never came.
pub const NET_LOST_OFFSET: usize = 0x318;
/// Header: frames that came again, or late.
pub const NET_REPEATED_OFFSET: usize = 0x320;
/// Header: frames with another content than was sent, or in another number of buffers than they say.
pub const NET_CORRUPT_OFFSET: usize = 0x328;
/// Header: frames of other protocols.
pub const NET_OTHERS_OFFSET: usize = 0x330;

/// Header: how far the guest is with its socket device ([`DRIVER_WORKING`] and kin), with `vsock`.
pub const VSOCK_STATE_OFFSET: usize = 0x340;
/// Header: connections that there are.
pub const VSOCK_OPEN_OFFSET: usize = 0x348;
/// Header: bytes sent back.
pub const VSOCK_ECHOED_OFFSET: usize = 0x350;
/// Header: how often the host refused the guest.
pub const VSOCK_REFUSED_OFFSET: usize = 0x358;
/// Header: packets that no device may send.
pub const VSOCK_WRONG_OFFSET: usize = 0x360;
/// Header: connections of the host that it had no room for.
pub const VSOCK_TURNED_AWAY_OFFSET: usize = 0x368;

/// Header: how far the guest is with its balloon ([`DRIVER_WORKING`] and kin), with `balloon`.
pub const BALLOON_STATE_OFFSET: usize = 0x380;
/// Header: how often it has filled the balloon's memory.
pub const BALLOON_FILLED_OFFSET: usize = 0x388;
/// Header: how often the device has dealt with a report of it.
pub const BALLOON_REPORTED_OFFSET: usize = 0x390;
/// The memory that is filled and reported: beyond what a guest of 64 MiB that walks little of it uses.
pub const BALLOON_ADDRESS: u64 = 40 << 20;
/// Its bytes.
pub const BALLOON_BYTES: u64 = 16 << 20;
/// Rings and numbers of pages for the balloon's queues to inflate and deflate, beyond that memory.
pub const BALLOON_RINGS: u64 = BALLOON_ADDRESS + BALLOON_BYTES;

/// Header: how far the guest is with its file system ([`DRIVER_WORKING`] and kin), with `fs`.
pub const FS_STATE_OFFSET: usize = 0x3a0;
/// Header: requests that failed, and replies to none.
pub const FS_ERRORS_OFFSET: usize = 0x3a8;
/// Header: the number of the last record that a lane has written.
#[must_use]
pub const fn fs_lane_offset(lane: usize) -> usize {
    0x3c0 + lane * 8
}
/// Lanes: requests that are under way at once.
pub const FS_LANES: usize = 8;
/// The most records that a lane has in the file.
pub const FS_LANE_RECORDS: u64 = 64;
/// Bytes of a record, whose words are [`disk_word`]'s.
pub const FS_RECORD: u64 = 512;
/// Rings and buffers, beyond the balloon's.
pub const FS_ADDRESS: u64 = BALLOON_RINGS + (1 << 20);

/// Where in the file the record of that number of a lane is, in records.
#[must_use]
pub const fn fs_place(lane: u64, number: u64) -> u64 {
    lane + FS_LANES as u64 * (number % FS_LANE_RECORDS)
}

/// Header: how far the guest is with the device that it loads ([`DRIVER_WORKING`] and kin), with `load`.
pub const LOAD_STATE_OFFSET: usize = 0x500;
/// Header: requests or frames that are done.
pub const LOAD_DONE_OFFSET: usize = 0x508;
/// Header: requests that the device said had failed.
pub const LOAD_ERRORS_OFFSET: usize = 0x510;
/// Rings and buffers, of a guest of 256 MiB.
pub const LOAD_ADDRESS: u64 = 128 << 20;

/// Header: how far the guest is with its virtio console ([`DRIVER_WORKING`] and kin), with `hvc`.
pub const HVC_STATE_OFFSET: usize = 0x420;
/// Header: bytes that were typed there, and that it sends back.
pub const HVC_ECHOED_OFFSET: usize = 0x428;
/// Header: buffers that came back and that were not under way.
pub const HVC_WRONG_OFFSET: usize = 0x430;

/// Header: how far the guest is with its entropy device ([`DRIVER_WORKING`] and kin), with `rng`.
pub const RNG_STATE_OFFSET: usize = 0x440;
/// Header: requests that it has answered.
pub const RNG_DONE_OFFSET: usize = 0x448;
/// Header: answers to none, answers that are not random, or not whole.
pub const RNG_WRONG_OFFSET: usize = 0x450;

/// Header: how far the guest is with the devices that it drives as no driver should ([`DRIVER_WORKING`] and kin), with `wreck`.
pub const WRECK_STATE_OFFSET: usize = 0x460;
/// Header: how many these are.
pub const WRECK_DEVICES_OFFSET: usize = 0x468;
/// Header: what was done to them.
pub const WRECK_TURNS_OFFSET: usize = 0x470;
/// Header: how often one of them said that it needs a reset.
pub const WRECK_BROKEN_OFFSET: usize = 0x478;
/// Header: at rest, those that serve a driver that behaves.
pub const WRECK_WELL_OFFSET: usize = 0x480;
/// Their rings and buffers, where a balloon's memory is with `balloon`; what lies behind is nobody's.
pub const WRECK_ADDRESS: u64 = BALLOON_ADDRESS;

/// Frames that are sent before one is acknowledged.
pub const NET_WINDOW: u64 = 32;
/// What a frame begins with: to everybody, from an address that nobody has, of a protocol for experiments (IEEE 802,
/// 9.2.4: EtherType 0x88b5), and two bytes of nothing.
pub const NET_FRAME_HEADER: [u8; 16] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x42, 0x88, 0xb5, 0, 0,
];
/// Where in a frame its words begin.
pub const NET_DATA: u64 = 16;
/// Who a frame is from.
pub const NET_FROM_GUEST: u64 = 1;
/// Who a frame is from.
pub const NET_FROM_HOST: u64 = 2;

/// Words of the frame of that number: short ones, long ones, and all between.
#[must_use]
pub const fn net_words(number: u64) -> u64 {
    6 + number.wrapping_mul(7) % 180
}

/// A word of the frame of that number, which acknowledges those of the other end up to another: both numbers, then what
/// no other frame has.
#[must_use]
pub const fn net_word(from: u64, number: u64, acknowledged: u64, word: u64) -> u64 {
    match word {
        0 => number,
        1 => acknowledged,
        _ => seal(from << 32 | word, number, acknowledged),
    }
}

/// Bytes from one slot to the next.
pub const SLOT_SIZE: usize = 0x200;
/// Offset of a vCPU's slot in the report, in bytes.
#[must_use]
pub const fn slot_offset(vcpu: usize) -> usize {
    0x1000 + vcpu * SLOT_SIZE
}

/// Slot: [`STATE_ABSENT`] or [`STATE_RUNNING`].
pub const STATE_OFFSET: usize = 0x00;
/// Slot: number of the turn that began last.
pub const SEQUENCE_OFFSET: usize = 0x08;
/// Slot: running checksum over all turns ([`chain`]).
pub const CHAIN_OFFSET: usize = 0x10;
/// Slot: number of the turn that ended last.
pub const SEQUENCE_DONE_OFFSET: usize = 0x18;
/// Slot: turns at which the words in memory were not those that the vCPU had left there.
pub const BREAKS_OFFSET: usize = 0x20;
/// Slot: TSC of the last turn.
pub const LAST_TSC_OFFSET: usize = 0x28;
/// Slot: largest gap between two turns since boot, in ticks.
pub const MAX_GAP_OFFSET: usize = 0x30;
/// Slot: largest gap since the statistics were cleared, in ticks.
pub const CLEARED_MAX_GAP_OFFSET: usize = 0x38;
/// Slot: gaps of at least the header's threshold, since boot.
pub const GAPS_OFFSET: usize = 0x40;
/// Slot: gaps of at least the header's threshold, since the statistics were cleared.
pub const CLEARED_GAPS_OFFSET: usize = 0x48;
/// Slot: TSC at which the largest gap since the statistics were cleared began.
pub const CLEARED_MAX_GAP_START_OFFSET: usize = 0x50;
/// Slot: TSC at which the last counted gap began.
pub const LAST_GAP_START_OFFSET: usize = 0x58;
/// Slot: length of the last counted gap, in ticks.
pub const LAST_GAP_OFFSET: usize = 0x60;
/// Slot: steps of the TSC backwards, since boot.
pub const BACKWARDS_OFFSET: usize = 0x68;
/// Slot: largest step of the TSC backwards, in ticks.
pub const MAX_BACKWARDS_OFFSET: usize = 0x70;
/// Slot: how often this vCPU cleared its statistics; equals the header's count when it has caught up.
pub const SLOT_CLEARS_OFFSET: usize = 0x78;
/// Slot: pages in this vCPU's share of the walk; 0 without `walk`.
pub const PAGES_OFFSET: usize = 0x100;
/// Slot: completed sweeps.
pub const SWEEPS_OFFSET: usize = 0x108;
/// Slot: pages that did not hold what was written.
pub const ERRORS_OFFSET: usize = 0x110;
/// Slot: guest-physical address of the last such page.
pub const ERROR_ADDRESS_OFFSET: usize = 0x118;
/// Slot: generation found in it.
pub const ERROR_FOUND_OFFSET: usize = 0x120;
/// Slot: generation expected in it.
pub const ERROR_EXPECTED_OFFSET: usize = 0x128;
/// Slot: ticks of the first sweep, which only writes and takes the faults of blank memory.
pub const FIRST_SWEEP_OFFSET: usize = 0x130;
/// Slot: ticks of the last sweep.
pub const LAST_SWEEP_OFFSET: usize = 0x138;
/// Slot: ticks of the fastest sweep after the first.
pub const MIN_SWEEP_OFFSET: usize = 0x140;
/// Slot: median ticks of the last sweeps (at most 15) in which no gap was counted.
pub const MEDIAN_SWEEP_OFFSET: usize = 0x148;
/// Slot: rounds finished that began at the end of a gap; such a round visits each page once, wherever the sweep stood.
pub const GAP_ROUNDS_OFFSET: usize = 0x150;
/// Slot: ticks of the last such round. A larger gap during a round starts it again, a smaller one does not.
pub const LAST_GAP_ROUND_OFFSET: usize = 0x158;
/// Slot: the gap that began it, in ticks.
pub const LAST_GAP_ROUND_GAP_OFFSET: usize = 0x160;
/// Slot: ticks of the slowest such round since the statistics were cleared.
pub const CLEARED_MAX_GAP_ROUND_OFFSET: usize = 0x168;
/// Slot: interrupts of the local timer, with `timer_us`.
pub const TIMER_TICKS_OFFSET: usize = 0x180;
/// Slot: TSC at which the vCPU saw the last of them.
pub const TIMER_TSC_OFFSET: usize = 0x188;
/// Slot: largest time between two of them, as the vCPU saw them, in ticks of the TSC.
pub const TIMER_MAX_GAP_OFFSET: usize = 0x190;
/// Slot: interrupts that this vCPU sent to the next one, with `ipi_us`. It sends none before the last has arrived.
pub const IPIS_SENT_OFFSET: usize = 0x198;
/// Slot: those of them that arrived.
pub const IPIS_ARRIVED_OFFSET: usize = 0x1a0;
/// Slot: interrupts that arrived at the next vCPU and were not sent.
pub const IPIS_EXTRA_OFFSET: usize = 0x1a8;
/// Slot: longest that one was under way, in ticks.
pub const IPI_MAX_OFFSET: usize = 0x1b0;

/// [`STATE_OFFSET`]: this vCPU was not started.
pub const STATE_ABSENT: u64 = 0;
/// [`STATE_OFFSET`]: this vCPU takes turns.
pub const STATE_RUNNING: u64 = 1;

/// The words that the walker keeps at the start of each page, in bytes from the page: address, generation, boot nonce,
/// and [`seal`] over the three.
pub const PAGE_ADDRESS_OFFSET: u64 = 0;
/// The generation: the number of the sweep that wrote it.
pub const PAGE_GENERATION_OFFSET: u64 = 8;
/// The boot nonce.
pub const PAGE_NONCE_OFFSET: u64 = 16;
/// [`seal`] of the three words before.
pub const PAGE_SEAL_OFFSET: u64 = 24;

/// Mailbox: nothing to do.
pub const COMMAND_NONE: u64 = 0;
/// Mailbox, console `clear`: clear the statistics that say so.
pub const COMMAND_CLEAR: u64 = 1;
/// Mailbox, console `reset`: reset through the keyboard controller.
pub const COMMAND_RESET: u64 = 2;
/// Mailbox, console `acpi-reset`: reset through the ACPI reset register.
pub const COMMAND_ACPI_RESET: u64 = 3;
/// Mailbox, console `acpi-off`: ACPI soft-off.
pub const COMMAND_ACPI_OFF: u64 = 4;
/// Mailbox, console `crash`: triple fault.
pub const COMMAND_CRASH: u64 = 5;

/// Mailbox: begin no further request to the disk.
pub const COMMAND_DISK_REST: u64 = 6;
/// Mailbox: go on with the disk.
pub const COMMAND_DISK_WORK: u64 = 7;

/// Mailbox: send no further frame.
pub const COMMAND_NET_REST: u64 = 8;
/// Mailbox: go on with frames.
pub const COMMAND_NET_WORK: u64 = 9;
/// Mailbox: connect to the host's port again.
pub const COMMAND_VSOCK_CONNECT: u64 = 10;
/// Mailbox: fill the balloon's memory.
pub const COMMAND_BALLOON_FILL: u64 = 11;
/// Mailbox: report it as free.
pub const COMMAND_BALLOON_REPORT: u64 = 12;
/// Mailbox: say through pvpanic that the kernel has panicked, and go on.
pub const COMMAND_PANIC: u64 = 13;
/// Mailbox: say that its crash kernel takes over, and go on.
pub const COMMAND_CRASH_LOADED: u64 = 14;
/// Mailbox: shut down through pvpanic.
pub const COMMAND_PV_SHUTDOWN: u64 = 15;
/// Mailbox: say that it has panicked, and reset at once, as `panic=-1` does.
pub const COMMAND_PANIC_RESET: u64 = 16;

/// Mailbox: let no device go.
pub const COMMAND_HOTPLUG_KEEP: u64 = 17;
/// Mailbox: let devices go again.
pub const COMMAND_HOTPLUG_YIELD: u64 = 18;
/// Mailbox: let every device go, whatever is under way.
pub const COMMAND_HOTPLUG_EJECT: u64 = 19;
/// Mailbox: begin no further request to the file system.
pub const COMMAND_FS_REST: u64 = 20;
/// Mailbox: drive every device as it should be, and then no more.
pub const COMMAND_WRECK_REST: u64 = 21;

/// The console's commands, with their numbers.
pub const COMMANDS: [(&str, u64); 5] = [
    ("clear", COMMAND_CLEAR),
    ("reset", COMMAND_RESET),
    ("acpi-reset", COMMAND_ACPI_RESET),
    ("acpi-off", COMMAND_ACPI_OFF),
    ("crash", COMMAND_CRASH),
];

/// Factor of [`chain`]; odd, so that each turn changes the sum.
const CHAIN_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// What turn number `sequence` adds to the running checksum.
#[must_use]
pub const fn chain_link(sequence: u64) -> u64 {
    sequence.wrapping_mul(CHAIN_FACTOR)
}

/// The running checksum after `sequence` turns: the sum of the links of turns 1 to `sequence`, in closed form, so that
/// a reader who saw none of them can check it. A lost or repeated turn leaves another value.
#[must_use]
pub const fn chain(sequence: u64) -> u64 {
    let (even, odd) = if sequence % 2 == 0 {
        (sequence / 2, sequence.wrapping_add(1))
    } else {
        (sequence.wrapping_add(1) / 2, sequence)
    };
    even.wrapping_mul(odd).wrapping_mul(CHAIN_FACTOR)
}

/// The word that closes a page's record, so that no single changed word goes unseen.
#[must_use]
pub const fn seal(address: u64, generation: u64, nonce: u64) -> u64 {
    let mut mixed = address ^ nonce.rotate_left(17) ^ generation.wrapping_mul(CHAIN_FACTOR);
    mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}
