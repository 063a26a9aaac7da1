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
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(61), "1 min 1 s");
        assert_eq!(seconds(90_000), "1 d 1 h");
    }
}
