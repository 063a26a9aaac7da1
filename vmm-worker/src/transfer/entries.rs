//! What the old worker says of the descriptors that it was handed, and the new one of its own: the same, or there is no upgrade.
//!
//! The descriptors come from the broker over one channel, and this over another. So whoever puts one in another's place on the way
//! between two brokers, with a description to match, is seen before the guest is paused. What fstat(2) cannot tell apart,
//! this cannot either: an eventfd from another, and a tap from another of the same host.

use std::collections::BTreeSet;

use baton_ipc::Description;
use baton_ipc::DescriptorKey;
use baton_ipc::Registry;
use baton_ipc::descriptor;
use baton_ipc::worker::MAX_NET_QUEUES;
use baton_ipc::worker::MAX_QUEUES;
use thiserror::Error;

/// A difference between the descriptors of two workers.
#[derive(Debug, Error)]
pub(crate) enum EntryError {
    /// Another object, or the same one open in another way.
    #[error("descriptor {key} is not the old worker's, which is {theirs}; what came is {ours}")]
    Differs {
        key: DescriptorKey,
        theirs: Box<Description>,
        ours: Box<Description>,
    },
    /// The old worker has one more.
    #[error("descriptor {0} of the old worker did not come")]
    Missing(DescriptorKey),
    /// The old worker does not have it.
    #[error("descriptor {0} came, which the old worker does not have")]
    Extra(DescriptorKey),
}

/// Descriptors by their names and ids, and what each is.
#[derive(Clone, Debug)]
pub(crate) struct Entries(Vec<(DescriptorKey, Description)>);

impl Entries {
    /// As the old worker has said.
    pub(crate) fn said(entries: Vec<(DescriptorKey, Description)>) -> Self {
        Self(entries)
    }

    /// Those in a registry, without the connections of a vsock, which come and go.
    pub(crate) fn lasting(registry: &Registry) -> Self {
        let all = registry.iter().filter(|(key, ..)| !is_passing(key));
        Self(
            all.map(|(key, description, _)| (key.clone(), description.clone()))
                .collect(),
        )
    }

    /// A device has come, with these.
    pub(crate) fn join(&mut self, device: Self) {
        self.0.extend(device.0);
    }

    /// The device in this slot has gone.
    pub(crate) fn leave(&mut self, slot: u8) {
        let slot = u32::from(slot);
        self.0.retain(|(key, _)| match key.name() {
            descriptor::DISK => key.id() != slot,
            descriptor::KICK => key.id() / MAX_QUEUES != slot,
            descriptor::NET => key.id() / u32::from(MAX_NET_QUEUES) != slot,
            _ => true,
        });
    }

    /// These and more, to be said.
    pub(crate) fn with(
        &self,
        more: Vec<(DescriptorKey, Description)>,
    ) -> Vec<(DescriptorKey, Description)> {
        self.0.iter().cloned().chain(more).collect()
    }

    /// Compares what the old worker says with what was handed over. A connection of a vsock that the old worker does not
    /// have may be there: no state names it, so it is closed again.
    ///
    /// # Errors
    ///
    /// [`EntryError`], the first difference.
    pub(crate) fn compare(&self, registry: &Registry) -> Result<(), EntryError> {
        for (key, theirs) in &self.0 {
            let Some(ours) = registry.description(key) else {
                return Err(EntryError::Missing(key.clone()));
            };
            if !ours.is_of_the_same(theirs) {
                return Err(EntryError::Differs {
                    key: key.clone(),
                    theirs: Box::new(theirs.clone()),
                    ours: Box::new(ours.clone()),
                });
            }
        }
        let said: BTreeSet<_> = self.0.iter().map(|(key, _)| key).collect();
        let mut lasting = registry
            .iter()
            .map(|(key, ..)| key)
            .filter(|key| !is_passing(key));
        match lasting.find(|key| !said.contains(key)) {
            Some(key) => Err(EntryError::Extra(key.clone())),
            None => Ok(()),
        }
    }
}

fn is_passing(key: &DescriptorKey) -> bool {
    key.name() == descriptor::VSOCK
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use baton_ipc::DescriptorKind;

    use super::*;

    fn registry(files: &[(&str, u32, &str)]) -> Registry {
        let mut registry = Registry::default();
        for (name, id, path) in files {
            let key = DescriptorKey::new(name, *id).unwrap();
            let file = OwnedFd::from(File::open(path).unwrap());
            registry.save(key, DescriptorKind::Image, file).unwrap();
        }
        registry
    }

    #[test]
    fn another_object_one_too_few_and_one_too_many_are_named() {
        const ONE: &str = "/proc/self/exe";
        let other = tempfile::NamedTempFile::new().unwrap();
        let other = other.path().to_str().unwrap();
        let said = Entries::lasting(&registry(&[("kernel", 0, ONE), ("initrd", 0, ONE)]));
        said.compare(&registry(&[("kernel", 0, ONE), ("initrd", 0, ONE)]))
            .unwrap();
        for (files, words) in [
            (
                &[("kernel", 0, other), ("initrd", 0, ONE)][..],
                "kernel#0 is not the old worker's",
            ),
            (&[("kernel", 0, ONE)], "initrd#0 of the old worker"),
            (
                &[("kernel", 0, ONE), ("initrd", 0, ONE), ("kernel", 1, ONE)],
                "kernel#1 came",
            ),
        ] {
            let error = said.compare(&registry(files)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_device_that_comes_is_among_them_until_it_goes() {
        const ONE: &str = "/proc/self/exe";
        let mut said = Entries::lasting(&registry(&[("disk", 1, ONE), ("kick", MAX_QUEUES, ONE)]));
        let (first, queue) = (2 * MAX_QUEUES, 2 * MAX_QUEUES + 1);
        let device = [("disk", 2, ONE), ("kick", first, ONE), ("kick", queue, ONE)];
        said.join(Entries::lasting(&registry(&device)));
        assert_eq!(said.0.len(), 5);
        said.leave(2);
        let left = registry(&[("disk", 1, ONE), ("kick", MAX_QUEUES, ONE)]);
        said.compare(&left).unwrap();
    }

    #[test]
    fn a_connection_may_be_new_but_not_another() {
        const ONE: &str = "/proc/self/exe";
        let with = registry(&[("vsock", 3, ONE)]);
        assert!(Entries::lasting(&with).0.is_empty());
        Entries::said(Vec::new()).compare(&with).unwrap();
        let (key, description, _) = with.iter().next().unwrap();
        let mut description = description.clone();
        Entries::said(vec![(key.clone(), description.clone())])
            .compare(&with)
            .unwrap();
        description.inode += 1;
        let said = Entries::said(vec![(key.clone(), description)]);
        assert!(matches!(
            said.compare(&with),
            Err(EntryError::Differs { .. })
        ));
    }
}
