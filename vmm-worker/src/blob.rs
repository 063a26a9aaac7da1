//! A kernel structure inside a saved state: its bytes, exactly as many as it has.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use serde::de::Error;
use serde::de::Visitor;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

/// A kernel structure, on the wire a byte string of its length. (kvm-bindings' own serde fills short input with zeroes
/// and cuts long input off.)
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blob<T>(pub(crate) T);

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0.as_bytes())
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Exactly<T>(PhantomData<T>);

        impl<T: FromBytes> Visitor<'_> for Exactly<T> {
            type Value = Blob<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "exactly {} bytes", size_of::<T>())
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Blob<T>, E> {
                T::read_from_bytes(bytes)
                    .map(Blob)
                    .map_err(|_| E::invalid_length(bytes.len(), &self))
            }
        }

        deserializer.deserialize_bytes(Exactly(PhantomData))
    }
}

/// Bytes of a length that only their reader can judge.
#[derive(Clone, Debug)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Borrowed first: a length past the input is refused before anything is allocated for it.
        <&[u8]>::deserialize(deserializer).map(|bytes| Bytes(bytes.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_regs;

    use super::*;

    #[test]
    fn only_the_exact_length_is_taken() {
        let regs = kvm_regs {
            rip: 0x1234,
            ..kvm_regs::default()
        };
        let bytes = postcard::to_stdvec(&Blob(regs)).unwrap();
        assert_eq!(bytes.len(), size_of::<kvm_regs>() + 2);
        assert_eq!(
            postcard::from_bytes::<Blob<kvm_regs>>(&bytes).unwrap().0,
            regs
        );
        for length in [0, 1, size_of::<kvm_regs>() - 1, size_of::<kvm_regs>() + 1] {
            let mut wire = postcard::to_stdvec(&length).unwrap();
            wire.extend(vec![0; length]);
            assert!(
                postcard::from_bytes::<Blob<kvm_regs>>(&wire).is_err(),
                "{length}"
            );
        }
    }
}
