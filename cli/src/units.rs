//! Sizes and times for people.

/// Bytes in the largest binary unit that leaves at least one.
#[expect(clippy::cast_precision_loss, reason = "one decimal place is shown")]
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if value.fract() == 0.0 {
        format!("{value:.0} {unit}")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// Microseconds, as milliseconds or seconds where that reads better.
#[expect(clippy::cast_precision_loss, reason = "two decimal places are shown")]
pub(crate) fn microseconds(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} µs"),
        1_000..1_000_000 => format!("{:.2} ms", count as f64 / 1e3),
        _ => format!("{:.2} s", count as f64 / 1e6),
    }
}

/// Seconds, in the two largest units.
pub(crate) fn seconds(count: u64) -> String {
    let (days, hours, minutes, seconds) = (
        count / 86_400,
        count / 3_600 % 24,
        count / 60 % 60,
        count % 60,
    );
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {seconds} s"),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// Milliseconds since the epoch, in UTC, as RFC 3339 writes it.
pub(crate) fn timestamp(ms: u64) -> String {
    let (days, second) = (ms / 86_400_000, ms / 1000 % 86_400);
    let leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let (mut year, mut day) = (1970, days);
    // A clock that is set to the far future has its year cut off, not this loop run on.
    while year < 9999 && day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in months {
        if day < length || month == 12 {
            break;
        }
        day -= length;
        month += 1;
    }
    format!(
        "{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        day + 1,
        second / 3600,
        second / 60 % 60,
        second % 60,
        ms % 1000
    )
}

/// The first twelve digits of a digest, enough to tell builds apart.
pub(crate) fn short_digest(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_where_they_read_better() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(256 << 20), "256 MiB");
        assert_eq!(microseconds(999), "999 µs");
        assert_eq!(microseconds(1_500), "1.50 ms");
        assert_eq!(microseconds(2_500_000), "2.50 s");
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(timestamp(1_735_689_599_999), "2024-12-31T23:59:59.999Z");
        assert!(timestamp(u64::MAX).starts_with("9999-12-"));
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(61), "1 min 1 s");
        assert_eq!(seconds(90_000), "1 d 1 h");
    }
}
