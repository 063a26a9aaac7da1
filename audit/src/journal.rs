//! A copy of each record for systemd's journal, where there is one: a datagram in its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>). The log file is the record; what the journal cannot take at once is not
//! sent, and nobody waits for it.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::path::PathBuf;

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// What fits into a datagram with the default send buffer of 212,992 bytes, and then some room (unix(7), SO_SNDBUF).
const MAX_RECORD: usize = 128 << 10;

/// Syslog's severities (syslog(3)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// LOG_CRIT: a guest is lost.
    Critical = 2,
    /// LOG_ERR
    Error = 3,
    /// LOG_WARNING
    Warning = 4,
    /// LOG_INFO
    Info = 6,
}

/// The way to the journal.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Journal {
    /// The journal that listens at this path, if there is one.
    #[must_use]
    pub fn at(path: &Path) -> Option<Self> {
        if !path.exists() {
            return None;
        }
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Sends a record. Whether it was taken.
    pub fn send(
        &self,
        priority: Priority,
        vm: &str,
        event: &str,
        sequence: u64,
        record: &[u8],
    ) -> bool {
        let mut datagram = Vec::with_capacity(record.len() + 256);
        let fields = [
            ("MESSAGE", format!("{vm}: {event}")),
            ("PRIORITY", (priority as u8).to_string()),
            ("SYSLOG_IDENTIFIER", "baton-broker".to_owned()),
            ("BATON_VM", vm.to_owned()),
            ("BATON_EVENT", event.to_owned()),
            ("BATON_SEQUENCE", sequence.to_string()),
        ];
        for (name, value) in &fields {
            field(&mut datagram, name, value.as_bytes());
        }
        if record.len() <= MAX_RECORD {
            field(&mut datagram, "BATON_RECORD", record);
        }
        // To the path and not to a connection: journald may be restarted under us.
        self.socket.send_to(&datagram, &self.path).is_ok()
    }
}

/// A field as `NAME=value`, or, where the value has a line feed, as name, length and bytes.
fn field(datagram: &mut Vec<u8>, name: &str, value: &[u8]) {
    datagram.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        datagram.push(b'\n');
        datagram.extend_from_slice(&u64::try_from(value.len()).unwrap_or(0).to_le_bytes());
    } else {
        datagram.push(b'=');
    }
    datagram.extend_from_slice(value);
    datagram.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_arrives_in_the_native_protocol() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert!(Journal::at(&path).is_none(), "there is no journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        assert!(journal.send(Priority::Info, "web1", "upgrade", 7, b"{\"a\":1}"));
        let mut buffer = [0; 4096];
        let length = journald.recv(&mut buffer).unwrap();
        let text = std::str::from_utf8(&buffer[..length]).unwrap();
        assert_eq!(
            text,
            "MESSAGE=web1: upgrade\nPRIORITY=6\nSYSLOG_IDENTIFIER=baton-broker\nBATON_VM=web1\nBATON_EVENT=upgrade\n\
             BATON_SEQUENCE=7\nBATON_RECORD={\"a\":1}\n"
        );
    }

    #[test]
    fn a_journal_that_takes_nothing_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(&path).unwrap();
        let taken = (0..10_000).filter(|_| journal.send(Priority::Info, "web1", "x", 0, b"{}"));
        assert!(taken.count() < 10_000);
        drop(journald);
        assert!(!journal.send(Priority::Info, "web1", "x", 0, b"{}"));
    }

    #[test]
    fn a_value_with_line_feeds_has_its_length() {
        let mut datagram = Vec::new();
        field(&mut datagram, "A", b"x\ny");
        assert_eq!(datagram, b"A\n\x03\0\0\0\0\0\0\0x\ny\n");
    }
}
