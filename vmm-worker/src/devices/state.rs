//! How a device's state becomes bytes, and how bytes of unknown origin become a device's state.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::id::DeviceId;

/// One device's saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSection {
    /// Whose.
    pub id: DeviceId,
    /// Version of the device's saved-state type.
    pub version: u16,
    /// That type, in postcard.
    pub bytes: Vec<u8>,
}

/// Why a saved state is refused. The state comes from another worker, which may be compromised.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// A version that this worker cannot read.
    #[error("version {found}; version {supported} is understood")]
    Version {
        /// What the section says.
        found: u16,
        /// What this worker reads.
        supported: u16,
    },
    /// Not postcard of the device's state.
    #[error("malformed: {0}")]
    Malformed(postcard::Error),
    /// The state is followed by more bytes.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// A field has a value that the device can never have.
    #[error("{name} is {value:#x}, {expected}")]
    Field {
        /// Name of the field.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        expected: &'static str,
    },
}

impl StateError {
    /// A field whose value is impossible.
    pub fn field(name: &'static str, value: impl Into<u64>, expected: &'static str) -> Self {
        StateError::Field {
            name,
            value: value.into(),
            expected,
        }
    }
}

/// Encodes a saved-state value as the section of `id`.
///
/// # Errors
///
/// [`StateError::Malformed`] when postcard refuses the type.
pub fn encode<T: Serialize>(
    id: DeviceId,
    version: u16,
    state: &T,
) -> Result<SavedSection, StateError> {
    let bytes = postcard::to_stdvec(state).map_err(StateError::Malformed)?;
    Ok(SavedSection { id, version, bytes })
}

/// Decodes a section of exactly this version; judging the values is the device's part.
///
/// # Errors
///
/// [`StateError`] for another version, bytes that are no `T`, and bytes left over.
pub fn decode<T: DeserializeOwned>(
    section: &SavedSection,
    supported: u16,
) -> Result<T, StateError> {
    if section.version != supported {
        return Err(StateError::Version {
            found: section.version,
            supported,
        });
    }
    parse(&section.bytes)
}

/// Reads a value that takes all of these bytes.
///
/// # Errors
///
/// [`StateError`] for bytes that are no `T`, and bytes left over.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StateError> {
    match postcard::take_from_bytes(bytes).map_err(StateError::Malformed)? {
        (state, []) => Ok(state),
        (_, rest) => Err(StateError::Trailing(rest.len())),
    }
}
