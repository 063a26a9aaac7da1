//! Capabilities: which a worker keeps (none), and how the launcher sheds the others for good.

use std::fmt;

use caps::{CapSet, Capability, CapsHashSet};
use rustix::thread::CapabilitiesSecureBits as Securebits;
use serde::{Deserialize, Serialize};

/// A set of capabilities, as the kernel's masks have them (`linux/capability.h`: bit n is capability n).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Capabilities(u64);

/// Capabilities that could not be shed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CapabilityError {
    /// The kernel refused a step.
    #[error("cannot {step}: {reason}; the launcher must hold CAP_SETPCAP in its user namespace")]
    Refused {
        /// What was attempted.
        step: &'static str,
        /// What the kernel said.
        reason: String,
    },
    /// Every step succeeded, and yet a set has a capability that it should not have, or lacks one to keep.
    #[error("the {set} set is {found} after shedding, {expected} was asked for")]
    NotShed {
        /// Which set.
        set: &'static str,
        /// What it is.
        found: Capabilities,
        /// What it should be.
        expected: Capabilities,
    },
}

impl Capabilities {
    /// None.
    pub const NONE: Self = Self(0);

    /// Those of a mask in `/proc/PID/status`.
    #[must_use]
    pub const fn from_mask(mask: u64) -> Self {
        Self(mask)
    }

    /// The mask.
    #[must_use]
    pub const fn mask(self) -> u64 {
        self.0
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that `self` has and `other` has not.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// With the one of this name (`CAP_NET_ADMIN`).
    #[must_use]
    pub fn with_name(self, name: &str) -> Option<Self> {
        let capability: Capability = name.parse().ok()?;
        Some(Self(self.0 | capability.bitmask()))
    }

    fn of(set: &CapsHashSet) -> Self {
        Self(
            set.iter()
                .fold(0, |mask, capability| mask | capability.bitmask()),
        )
    }

    fn to_caps(self) -> CapsHashSet {
        caps::all()
            .into_iter()
            .filter(|capability| self.0 & capability.bitmask() != 0)
            .collect()
    }
}

/// Sheds every capability of the calling thread but `keep`, for good: bounding set first (that takes a capability,
/// CAP_SETPCAP), then ambient, inheritable, permitted and effective. Afterwards an exec as user 0 gains none, none
/// can be raised, and all of it is locked by securebits. Reads every set back.
///
/// `no_new_privs` is set by [`crate::no_new_privs`], not here.
///
/// # Errors
///
/// When the kernel refuses a step, or when a set is afterwards not what it should be.
pub fn drop_all(keep: Capabilities) -> Result<(), CapabilityError> {
    shed(keep, keep)
}

/// The same, but what is kept is the calling thread's alone: what it executes has no capability.
///
/// # Errors
///
/// As [`drop_all`].
pub fn limit_to(keep: Capabilities) -> Result<(), CapabilityError> {
    shed(keep, Capabilities::NONE)
}

/// Keeps some capabilities, and of them some over an exec.
fn shed(keep: Capabilities, over_exec: Capabilities) -> Result<(), CapabilityError> {
    let refused = |step: &'static str| {
        move |reason: &dyn fmt::Display| CapabilityError::Refused {
            step,
            reason: reason.to_string(),
        }
    };
    let ambient_bits = if over_exec.is_empty() {
        Securebits::NO_CAP_AMBIENT_RAISE | Securebits::NO_CAP_AMBIENT_RAISE_LOCKED
    } else {
        Securebits::empty()
    };
    let locked = Securebits::NO_ROOT
        | Securebits::NO_ROOT_LOCKED
        | Securebits::NO_SETUID_FIXUP
        | Securebits::NO_SETUID_FIXUP_LOCKED
        | Securebits::KEEP_CAPS_LOCKED
        | ambient_bits;
    rustix::thread::set_capabilities_secure_bits(locked)
        .map_err(|error| refused("lock the securebits")(&error))?;

    let (kept, handed_on) = (keep.to_caps(), over_exec.to_caps());
    // Numbers rather than names: the kernel may know capabilities that the crate does not.
    for number in 0..64_u32 {
        let bit = rustix::thread::CapabilitySet::from_bits_retain(1 << number);
        let held = match rustix::thread::capability_is_in_bounding_set(bit) {
            Ok(held) => held,
            // Past the kernel's last capability.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(refused("read the bounding set")(&error)),
        };
        if held && keep.mask() & (1 << number) == 0 {
            rustix::thread::remove_capability_from_bounding_set(bit)
                .map_err(|error| refused("shrink the bounding set")(&error))?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(|error| refused("clear the ambient set")(&error))?;
    caps::set(None, CapSet::Inheritable, &handed_on)
        .map_err(|error| refused("set the inheritable set")(&error))?;
    for capability in &handed_on {
        caps::raise(None, CapSet::Ambient, *capability)
            .map_err(|error| refused("keep a capability over the exec")(&error))?;
    }
    caps::set(None, CapSet::Effective, &kept)
        .map_err(|error| refused("set the effective set")(&error))?;
    caps::set(None, CapSet::Permitted, &kept)
        .map_err(|error| refused("set the permitted set")(&error))?;
    verify(keep, over_exec)
}

fn verify(keep: Capabilities, over_exec: Capabilities) -> Result<(), CapabilityError> {
    let sets = [
        ("bounding", CapSet::Bounding, keep),
        ("ambient", CapSet::Ambient, over_exec),
        ("inheritable", CapSet::Inheritable, over_exec),
        ("permitted", CapSet::Permitted, keep),
        ("effective", CapSet::Effective, keep),
    ];
    for (set, kind, keep) in sets {
        let found = caps::read(None, kind).map_err(|error| CapabilityError::Refused {
            step: "read the sets back",
            reason: error.to_string(),
        })?;
        let found = Capabilities::of(&found);
        // The bounding set may lack what the launcher never had.
        let right = if matches!(kind, CapSet::Bounding) {
            found.without(keep).is_empty()
        } else {
            found == keep
        };
        if !right {
            return Err(CapabilityError::NotShed {
                set,
                found,
                expected: keep,
            });
        }
    }
    Ok(())
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let named = self.to_caps();
        let mut names: Vec<String> = named.iter().map(ToString::to_string).collect();
        names.sort();
        let unnamed = self.0 & !Self::of(&named).0;
        if unnamed != 0 {
            names.push(format!("{unnamed:#x}"));
        }
        f.write_str(&names.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels() {
        let some = Capabilities::NONE
            .with_name("CAP_NET_ADMIN")
            .unwrap()
            .with_name("CAP_CHOWN")
            .unwrap();
        assert_eq!(some.mask(), 1 << 12 | 1);
        assert_eq!(some.to_string(), "CAP_CHOWN CAP_NET_ADMIN");
        assert_eq!(Capabilities::NONE.with_name("CAP_NO_SUCH"), None);
        assert_eq!(
            Capabilities::from_mask(1 << 63 | 1).to_string(),
            "CAP_CHOWN 0x8000000000000000"
        );
    }
}
