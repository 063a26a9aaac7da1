//! The header of every packet (5.10.6), as bytes and as a type.

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER: usize = 44;
/// The host's context id (vsock(7): VMADDR_CID_HOST).
pub(super) const HOST_CID: u64 = 2;
/// The type of stream sockets (5.10.6: VIRTIO_VSOCK_TYPE_STREAM).
pub(super) const STREAM: u16 = 1;

/// What a packet is for (5.10.6, enum virtio_vsock_op).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Something that no driver sends.
    Other(u16),
}

impl From<u16> for Operation {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Other(other),
        }
    }
}

impl From<Operation> for u16 {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::Request => 1,
            Operation::Response => 2,
            Operation::Reset => 3,
            Operation::Shutdown => 4,
            Operation::Data => 5,
            Operation::CreditUpdate => 6,
            Operation::CreditRequest => 7,
            Operation::Other(other) => other,
        }
    }
}

/// Flags of a shutdown (5.10.6.6): who sends it will not receive, will not send.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source: (u64, u32),
    pub(super) destination: (u64, u32),
    /// Bytes of data that follow.
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) operation: Operation,
    pub(super) flags: u32,
    /// What the sender has room for in all, and has made free of that since the connection began, in bytes (5.10.6.3).
    pub(super) room: u32,
    pub(super) freed: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let mut rest = bytes.as_slice();
        let (source, destination) = (take(&mut rest), take(&mut rest));
        let ports = (take(&mut rest), take(&mut rest));
        Self {
            source: (u64::from_le_bytes(source), u32::from_le_bytes(ports.0)),
            destination: (u64::from_le_bytes(destination), u32::from_le_bytes(ports.1)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            operation: u16::from_le_bytes(take(&mut rest)).into(),
            flags: u32::from_le_bytes(take(&mut rest)),
            room: u32::from_le_bytes(take(&mut rest)),
            freed: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.source.0.to_le_bytes());
        bytes.extend(self.destination.0.to_le_bytes());
        bytes.extend(self.source.1.to_le_bytes());
        bytes.extend(self.destination.1.to_le_bytes());
        bytes.extend(self.length.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(u16::from(self.operation).to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.room.to_le_bytes());
        bytes.extend(self.freed.to_le_bytes());
        bytes
    }
}

/// The next bytes; zeroes where there are none.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, others)) = rest.split_first_chunk() else {
        return [0; N];
    };
    *rest = others;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_where_the_specification_has_its_fields() {
        let header = Header {
            source: (0x0102_0304_0506_0708, 0x1112_1314),
            destination: (2, 0x2122_2324),
            length: 0x3132_3334,
            kind: STREAM,
            operation: Operation::Data,
            flags: 0x4142_4344,
            room: 0x5152_5354,
            freed: 0x6162_6364,
        };
        let bytes: [u8; HEADER] = header.bytes().try_into().unwrap();
        assert_eq!(bytes[..8], 0x0102_0304_0506_0708_u64.to_le_bytes());
        assert_eq!(bytes[8..16], 2_u64.to_le_bytes());
        assert_eq!(bytes[16..20], 0x1112_1314_u32.to_le_bytes());
        assert_eq!(bytes[20..24], 0x2122_2324_u32.to_le_bytes());
        assert_eq!(bytes[24..28], 0x3132_3334_u32.to_le_bytes());
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32..36], 0x4142_4344_u32.to_le_bytes());
        assert_eq!(bytes[36..40], 0x5152_5354_u32.to_le_bytes());
        assert_eq!(bytes[40..], 0x6162_6364_u32.to_le_bytes());
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn every_operation_is_its_number() {
        for number in 0..16 {
            assert_eq!(u16::from(Operation::from(number)), number);
        }
    }
}
