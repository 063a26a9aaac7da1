//! A process that implements a device by vhost-user, and badly: it answers what a test says.

use std::io::Read as _;
use std::io::Write as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Features that the embedded guest's driver wants, flush, indirect descriptors and version 1 (virtio 1.2, 5.2.3 and chapter
/// 6), and that there are protocol features.
pub const FEATURES: u64 = 1 << 9 | 1 << 28 | 1 << 30 | 1 << 32;
/// Protocol features: queues can be counted, configuration can be asked for.
pub const PROTOCOL: u64 = 1 | 1 << 9;

// Requests by their numbers (VHOST_USER_*).
/// GET_FEATURES.
pub const GET_FEATURES: u32 = 1;
/// GET_PROTOCOL_FEATURES.
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// GET_QUEUE_NUM.
pub const GET_QUEUE_NUM: u32 = 17;
/// SET_VRING_ENABLE: the last of what starts a ring.
pub const SET_VRING_ENABLE: u32 = 18;
/// GET_CONFIG.
pub const GET_CONFIG: u32 = 24;

/// A reply as it is on the wire.
#[must_use]
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    let mut bytes = [request, 5, length].map(u32::to_le_bytes).concat();
    bytes.extend(payload);
    bytes
}

/// What a process answers that means well; nothing, to what has no answer.
#[must_use]
pub fn well_meant(request: u32) -> Vec<u8> {
    match request {
        GET_FEATURES => reply(request, &FEATURES.to_le_bytes()),
        GET_PROTOCOL_FEATURES => reply(request, &PROTOCOL.to_le_bytes()),
        GET_QUEUE_NUM => reply(request, &1_u64.to_le_bytes()),
        GET_CONFIG => {
            // Offset, length and flags; then the capacity in sectors, and the rest of it.
            let mut payload = [0_u32, 60, 0].map(u32::to_le_bytes).concat();
            payload.extend(8192_u64.to_le_bytes());
            payload.resize(12 + 60, 0);
            reply(request, &payload)
        }
        _ => Vec::new(),
    }
}

/// Listens at `socket`, for one connection after another, for as long as the test runs: to each request it says what `answer`
/// says. `None` hangs up.
///
/// # Panics
///
/// When nobody can listen there.
pub fn impostor(socket: &Path, mut answer: impl FnMut(u32) -> Option<Vec<u8>> + Send + 'static) {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut header = [0; 12];
            while stream.read_exact(&mut header).is_ok() {
                let word = |at: usize| {
                    let bytes = header.get(at..at + 4).unwrap_or_default();
                    u32::from_le_bytes(bytes.try_into().unwrap_or_default())
                };
                let mut payload = vec![0; word(8).try_into().unwrap()];
                let heard = stream.read_exact(&mut payload).is_ok();
                let said = answer(word(0)).filter(|_| heard);
                if said.is_none_or(|bytes| stream.write_all(&bytes).is_err()) {
                    break;
                }
            }
        }
    });
}
