//! What time it is, in every format, and what an upgrade keeps.

use super::*;

const CPR: StartMode = StartMode::CprTransfer;

/// 2024-02-29 23:59:58.5 UTC, a Thursday.
fn leap_day() -> Duration {
    Duration::new(1_709_251_198, 500_000_000)
}

fn read(rtc: &mut Rtc, index: u8) -> u8 {
    rtc.write(0, &[index]);
    let mut byte = [0xFF];
    rtc.read(1, &mut byte);
    byte[0]
}

fn write(rtc: &mut Rtc, index: u8, value: u8) {
    rtc.write(0, &[index, value]);
}

#[test]
fn the_time_in_bcd_and_binary() {
    let mut rtc = Rtc::with_clock(leap_day);
    let registers = [
        SECONDS,
        MINUTES,
        HOURS,
        DAY_OF_WEEK,
        DAY,
        MONTH,
        YEAR,
        CENTURY,
    ];
    assert_eq!(
        registers.map(|index| read(&mut rtc, index)),
        [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]
    );
    write(&mut rtc, REGISTER_B, HOURS_24 | BINARY);
    assert_eq!(
        registers.map(|index| read(&mut rtc, index)),
        [58, 59, 23, 5, 29, 2, 24, 20]
    );
    write(&mut rtc, REGISTER_B, 0);
    assert_eq!(read(&mut rtc, HOURS), PM | 0x11);
}

#[test]
fn hours_of_the_twelve_hour_clock() {
    let clocks: [(fn() -> Duration, u8); 4] = [
        (|| Duration::from_secs(0), 0x12),
        (|| Duration::from_secs(11 * 3600), 0x11),
        (|| Duration::from_secs(12 * 3600), 0x12 | PM),
        (|| Duration::from_secs(13 * 3600), 0x01 | PM),
    ];
    for (clock, hours) in clocks {
        let mut rtc = Rtc::with_clock(clock);
        write(&mut rtc, REGISTER_B, 0);
        assert_eq!(read(&mut rtc, HOURS), hours);
    }
}

#[test]
fn dates() {
    // From `date -u -d @N`.
    for (seconds, year, month, day, day_of_week) in [
        (0, 1970, 1, 1, 5),
        (951_782_400, 2000, 2, 29, 3),
        (951_868_800, 2000, 3, 1, 4),
        (1_735_603_200, 2024, 12, 31, 3),
        (4_107_542_400, 2100, 3, 1, 2),
        (4_107_456_000, 2100, 2, 28, 1),
    ] {
        let date = Date::of(seconds);
        assert_eq!(
            (date.year, date.month, date.day, date.day_of_week),
            (year, month, day, day_of_week),
            "{seconds}"
        );
    }
}

#[test]
fn the_host_clock_is_what_is_shown() {
    let (before, mut rtc) = (wall_clock(), Rtc::new());
    write(&mut rtc, REGISTER_B, HOURS_24 | BINARY);
    let shown = u64::from(read(&mut rtc, CENTURY)) * 100 + u64::from(read(&mut rtc, YEAR));
    let after = wall_clock();
    assert!((Date::of(before.as_secs()).year..=Date::of(after.as_secs()).year).contains(&shown));
}

#[test]
fn the_guest_cannot_set_the_time_or_enable_interrupts() {
    let mut rtc = Rtc::with_clock(leap_day);
    for index in [
        SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY, REGISTER_C, REGISTER_D,
    ] {
        let value = read(&mut rtc, index);
        write(&mut rtc, index, 0x11);
        assert_eq!(read(&mut rtc, index), value, "{index:#x}");
    }
    write(&mut rtc, REGISTER_B, 0xFF);
    assert_eq!(read(&mut rtc, REGISTER_B), REGISTER_B_BITS);
}

#[test]
fn an_update_is_announced() {
    let mut quiet = Rtc::with_clock(|| Duration::from_nanos(999_755_999));
    assert_eq!(read(&mut quiet, REGISTER_A), REGISTER_A_RESET);
    let mut soon = Rtc::with_clock(|| Duration::from_nanos(999_756_000));
    assert_eq!(
        read(&mut soon, REGISTER_A),
        REGISTER_A_RESET | UPDATE_IN_PROGRESS
    );
}

#[test]
fn memory_survives_resets_and_upgrades() {
    let mut old = Rtc::with_clock(leap_day);
    write(&mut old, 0x0E, 1);
    write(&mut old, 0x7F, 2);
    write(&mut old, 0x8F, 3);
    old.setup(StartMode::None).unwrap();
    old.write(0, &[0x0F]);
    let section = old.save(CPR).unwrap();
    let mut new = Rtc::with_clock(leap_day);
    new.load(CPR, &section).unwrap();
    assert_eq!(new.save(CPR).unwrap(), section);
    let mut byte = [0];
    new.read(1, &mut byte);
    assert_eq!(byte, [3], "the index, too; its top bit is the NMI's");
    assert_eq!((read(&mut new, 0x0E), read(&mut new, 0x7F)), (1, 2));
    let mut index = [0xFF];
    new.read(0, &mut index);
    assert_eq!(index, [0xFF], "the index port cannot be read");
}

#[test]
fn every_impossible_field_is_named() {
    let good = || SavedRtc {
        index: 0x7F,
        register_a: 0x26,
        register_b: REGISTER_B_BITS,
        memory: vec![0; 114],
    };
    let load = |saved: SavedRtc| {
        let mut rtc = Rtc::new();
        let section = state::encode(rtc.id(), VERSION, &saved).unwrap();
        rtc.load(CPR, &section)
    };
    load(good()).unwrap();
    let cases = [
        (
            SavedRtc {
                index: 0x80,
                ..good()
            },
            "index",
            0x80,
        ),
        (
            SavedRtc {
                register_a: 0xA6,
                ..good()
            },
            "register_a",
            0xA6,
        ),
        (
            SavedRtc {
                register_b: 0x10,
                ..good()
            },
            "register_b",
            0x10,
        ),
        (
            SavedRtc {
                memory: vec![0; 113],
                ..good()
            },
            "memory",
            113,
        ),
        (
            SavedRtc {
                memory: vec![0; 115],
                ..good()
            },
            "memory",
            115,
        ),
    ];
    for (saved, field, bad) in cases {
        match load(saved) {
            Err(DeviceError::State(StateError::Field { name, value, .. })) => {
                assert_eq!((name, value), (field, bad));
            }
            other => panic!("{field}: {other:?}"),
        }
    }
}
