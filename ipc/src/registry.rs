//! The one table of descriptors of a process: the broker's of what it holds, a worker's of what it was handed.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::Description;
use crate::DescriptorError;
use crate::DescriptorKey;
use crate::DescriptorKind;

/// The most descriptors of one VM.
const MAX_ENTRIES: usize = 1024;

/// Why the registry refuses.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// The key is taken.
    #[error("descriptor {0} is there already")]
    Duplicate(DescriptorKey),
    /// No such descriptor; nobody makes one in its place.
    #[error("descriptor {0} is missing")]
    Missing(DescriptorKey),
    /// It is there, and another kind.
    #[error("descriptor {key} is {found:?}, not {expected:?}")]
    Kind {
        /// Which.
        key: DescriptorKey,
        /// The kind asked for.
        expected: DescriptorKind,
        /// The kind it is.
        found: DescriptorKind,
    },
    /// It is not what it was announced to be.
    #[error("descriptor {key}: {source}")]
    Descriptor {
        /// Which.
        key: DescriptorKey,
        /// What is wrong.
        source: DescriptorError,
    },
    /// [`MAX_ENTRIES`] are there.
    #[error("more than {MAX_ENTRIES} descriptors")]
    Full,
    /// Descriptors that no device took.
    #[error("nobody claimed {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Unclaimed(Vec<DescriptorKey>),
}

#[derive(Debug)]
struct Entry {
    description: Description,
    fd: OwnedFd,
}

/// Descriptors by (name, id).
#[derive(Debug, Default)]
pub struct Registry {
    entries: BTreeMap<DescriptorKey, Entry>,
}

impl Registry {
    /// Takes a descriptor in, described as what it is now.
    ///
    /// # Errors
    ///
    /// A duplicate key, a descriptor of another kind, a full registry; the descriptor is closed.
    pub fn save(
        &mut self,
        key: DescriptorKey,
        kind: DescriptorKind,
        fd: OwnedFd,
    ) -> Result<(), RegistryError> {
        match Description::of(kind, fd.as_fd()) {
            Ok(description) => self.insert(key, description, fd),
            Err(source) => Err(RegistryError::Descriptor { key, source }),
        }
    }

    /// Takes a descriptor in that a peer has described, after checking that it is that one.
    ///
    /// # Errors
    ///
    /// As [`Registry::save`], and any difference from `description`.
    pub fn save_verified(
        &mut self,
        key: DescriptorKey,
        description: Description,
        fd: OwnedFd,
    ) -> Result<(), RegistryError> {
        match description.verify(fd.as_fd()) {
            Ok(()) => self.insert(key, description, fd),
            Err(source) => Err(RegistryError::Descriptor { key, source }),
        }
    }

    fn insert(
        &mut self,
        key: DescriptorKey,
        description: Description,
        fd: OwnedFd,
    ) -> Result<(), RegistryError> {
        if self.entries.contains_key(&key) {
            return Err(RegistryError::Duplicate(key));
        }
        if self.entries.len() >= MAX_ENTRIES {
            return Err(RegistryError::Full);
        }
        self.entries.insert(key, Entry { description, fd });
        Ok(())
    }

    /// The descriptor of this key, if it is of this kind.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`] or [`RegistryError::Kind`].
    pub fn find(
        &self,
        key: &DescriptorKey,
        kind: DescriptorKind,
    ) -> Result<BorrowedFd<'_>, RegistryError> {
        let entry = self
            .entries
            .get(key)
            .ok_or_else(|| RegistryError::Missing(key.clone()))?;
        check_kind(key, kind, entry)?;
        Ok(entry.fd.as_fd())
    }

    /// What the descriptor of this key is, if there is one.
    #[must_use]
    pub fn description(&self, key: &DescriptorKey) -> Option<&Description> {
        self.entries.get(key).map(|entry| &entry.description)
    }

    /// Hands a descriptor to the device that it was meant for, and out of the registry.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`] or [`RegistryError::Kind`]; in the latter case it stays, unclaimed.
    pub fn claim(
        &mut self,
        key: &DescriptorKey,
        kind: DescriptorKind,
    ) -> Result<OwnedFd, RegistryError> {
        self.find(key, kind)?;
        self.entries
            .remove(key)
            .map(|entry| entry.fd)
            .ok_or_else(|| RegistryError::Missing(key.clone()))
    }

    /// Hands out every descriptor of a name that is of this kind, by id.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Kind`] for the first that is of another.
    pub fn claim_all(
        &mut self,
        name: &str,
        kind: DescriptorKind,
    ) -> Result<BTreeMap<u32, OwnedFd>, RegistryError> {
        let keys: Vec<DescriptorKey> = self.entries.keys().cloned().collect();
        let named = keys.into_iter().filter(|key| key.name() == name);
        named
            .map(|key| Ok((key.id(), self.claim(&key, kind)?)))
            .collect()
    }

    /// Takes everything of another registry in.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Duplicate`] and [`RegistryError::Full`]; what was not taken is closed.
    pub fn absorb(&mut self, other: Self) -> Result<(), RegistryError> {
        other
            .entries
            .into_iter()
            .try_for_each(|(key, entry)| self.insert(key, entry.description, entry.fd))
    }

    /// Describes a descriptor anew, whose object its owner has changed.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`], or [`RegistryError::Descriptor`] when it cannot be examined; its description stays then.
    pub fn refresh(&mut self, key: &DescriptorKey) -> Result<(), RegistryError> {
        let entry = self
            .entries
            .get_mut(key)
            .ok_or_else(|| RegistryError::Missing(key.clone()))?;
        entry.description =
            Description::of(entry.description.kind, entry.fd.as_fd()).map_err(|source| {
                RegistryError::Descriptor {
                    key: key.clone(),
                    source,
                }
            })?;
        Ok(())
    }

    /// Closes a descriptor.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Missing`].
    pub fn delete(&mut self, key: &DescriptorKey) -> Result<(), RegistryError> {
        match self.entries.remove(key) {
            Some(_) => Ok(()),
            None => Err(RegistryError::Missing(key.clone())),
        }
    }

    /// Says that the build is over: what is still here, nobody claimed.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Unclaimed`] with every such key.
    pub fn finish(&self) -> Result<(), RegistryError> {
        if self.entries.is_empty() {
            Ok(())
        } else {
            Err(RegistryError::Unclaimed(
                self.entries.keys().cloned().collect(),
            ))
        }
    }

    /// All descriptors, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&DescriptorKey, &Description, BorrowedFd<'_>)> {
        self.entries
            .iter()
            .map(|(key, entry)| (key, &entry.description, entry.fd.as_fd()))
    }

    /// How many descriptors there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

fn check_kind(
    key: &DescriptorKey,
    expected: DescriptorKind,
    entry: &Entry,
) -> Result<(), RegistryError> {
    let found = entry.description.kind;
    if found == expected {
        Ok(())
    } else {
        Err(RegistryError::Kind {
            key: key.clone(),
            expected,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn image() -> OwnedFd {
        File::open("/proc/self/exe").unwrap().into()
    }

    fn key(name: &str) -> DescriptorKey {
        DescriptorKey::new(name, 0).unwrap()
    }

    #[test]
    fn save_refuses_a_duplicate_and_find_tells_kind_from_absence() {
        let mut registry = Registry::default();
        registry
            .save(key("kernel"), DescriptorKind::Image, image())
            .unwrap();
        assert!(matches!(
            registry.save(key("kernel"), DescriptorKind::Image, image()),
            Err(RegistryError::Duplicate(_))
        ));
        assert!(registry.find(&key("kernel"), DescriptorKind::Image).is_ok());
        assert!(matches!(
            registry.find(&key("kernel"), DescriptorKind::Kvm),
            Err(RegistryError::Kind { .. })
        ));
        assert!(matches!(
            registry.find(&key("initrd"), DescriptorKind::Image),
            Err(RegistryError::Missing(_))
        ));
    }

    #[test]
    fn a_file_that_has_grown_is_described_anew() {
        let mut registry = Registry::default();
        let path = std::env::temp_dir().join(format!("baton-registry-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let copy = file.try_clone().unwrap();
        registry
            .save(key("disk"), DescriptorKind::Disk, file.into())
            .unwrap();
        copy.set_len(4096).unwrap();
        let size = |registry: &Registry| registry.iter().next().unwrap().1.size;
        assert_eq!(size(&registry), 0);
        registry.refresh(&key("disk")).unwrap();
        assert_eq!(size(&registry), 4096);
        assert!(registry.refresh(&key("other")).is_err());
    }

    #[test]
    fn what_nobody_claimed_is_named() {
        let mut registry = Registry::default();
        registry
            .save(key("kernel"), DescriptorKind::Image, image())
            .unwrap();
        registry
            .save(key("extra"), DescriptorKind::Image, image())
            .unwrap();
        registry
            .claim(&key("kernel"), DescriptorKind::Image)
            .unwrap();
        assert_eq!(
            registry.finish().unwrap_err().to_string(),
            "nobody claimed extra#0"
        );
        registry.delete(&key("extra")).unwrap();
        registry.finish().unwrap();
        assert!(matches!(
            registry.delete(&key("extra")),
            Err(RegistryError::Missing(_))
        ));
    }
}
