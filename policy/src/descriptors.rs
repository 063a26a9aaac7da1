//! Which descriptors a worker may be handed: the policy's side of the broker's table.
//!
//! The broker opens by path, then asks of the open descriptor what it really is, and compares that here. Nothing in
//! this module opens or inspects.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What the policy grants under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The name in the descriptor table.
    pub name: String,
    /// What the descriptor may be.
    pub kinds: BTreeSet<Kind>,
    /// The most that may be done with it.
    pub access: Access,
    /// Seals that a memfd must have.
    pub seals: BTreeSet<Seal>,
    /// How many of the name a worker may hold, with indices from 0.
    pub count: u32,
    /// Where it may be opened from. Empty: the broker makes it, no path is opened.
    pub paths: Vec<PathPattern>,
    /// Addresses of this host between which it may be a TCP connection. Empty: it is none.
    pub addresses: BTreeSet<IpAddr>,
    /// The reason.
    pub why: String,
    /// The line of the file, from 1.
    pub line: usize,
}

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// `/dev/kvm` (character device 10:232).
    Kvm,
    /// A memfd.
    Memfd,
    /// A regular file.
    File,
    /// A block device.
    Block,
    /// A queue of a tap.
    Tap,
    /// A terminal.
    Terminal,
    /// A pipe.
    Pipe,
    /// An eventfd.
    Eventfd,
    /// A connected stream socket.
    StreamSocket,
    /// A connected sequenced-packet socket.
    SeqpacketSocket,
    /// A VFIO container, `/dev/vfio/vfio` (character device 10:196).
    VfioContainer,
    /// A device that VFIO gave out.
    VfioDevice,
}

/// What may be done with a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Both.
    ReadWrite,
}

/// A seal of a memfd (`fcntl(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seal {
    /// `F_SEAL_SEAL`: no further seals.
    Seal,
    /// `F_SEAL_SHRINK`
    Shrink,
    /// `F_SEAL_GROW`
    Grow,
    /// `F_SEAL_WRITE`
    Write,
    /// `F_SEAL_FUTURE_WRITE`
    FutureWrite,
    /// `F_SEAL_EXEC`: the executable bits cannot change.
    Exec,
}

/// Absolute paths: `*` stands for anything within one component, `**` as a component for any number of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathPattern(String);

/// A descriptor as the broker found it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The name under which it is to be handed out.
    pub name: &'a str,
    /// Its index under that name.
    pub index: u32,
    /// What it is.
    pub kind: Kind,
    /// Its access mode.
    pub access: Access,
    /// Its seals, for a memfd.
    pub seals: &'a BTreeSet<Seal>,
    /// The path that it was opened from, resolved; `None` when the broker made it.
    pub path: Option<&'a Path>,
}

/// Why a descriptor may not be handed out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrantError {
    /// No grant of the name.
    #[error("the policy grants no descriptor called {name:?}")]
    UnknownName {
        /// The name.
        name: String,
    },
    /// More than the policy allows.
    #[error("{name}.{index}: the policy grants {count} of that name")]
    TooMany {
        /// The name.
        name: String,
        /// The index.
        index: u32,
        /// How many are granted.
        count: u32,
    },
    /// Something else.
    #[error("{name}.{index} is a {kind}, which the policy does not grant under that name")]
    Kind {
        /// The name.
        name: String,
        /// The index.
        index: u32,
        /// What it is.
        kind: Kind,
    },
    /// More access than is granted.
    #[error("{name}.{index} is open for {access}, the policy grants {granted}")]
    Access {
        /// The name.
        name: String,
        /// The index.
        index: u32,
        /// Its access mode.
        access: Access,
        /// What is granted.
        granted: Access,
    },
    /// A seal is missing.
    #[error("{name}.{index} lacks the seal {seal}")]
    Unsealed {
        /// The name.
        name: String,
        /// The index.
        index: u32,
        /// The seal.
        seal: Seal,
    },
    /// Opened from elsewhere.
    #[error("{name}.{index}: the policy grants no {path:?} under that name")]
    Path {
        /// The name.
        name: String,
        /// The index.
        index: u32,
        /// From where.
        path: Option<String>,
    },
}

impl Grant {
    /// Whether the candidate may be handed out under this grant.
    ///
    /// # Errors
    ///
    /// The first thing that the grant does not cover.
    pub fn permits(&self, candidate: &Candidate<'_>) -> Result<(), GrantError> {
        let Candidate {
            name,
            index,
            kind,
            access,
            seals,
            path,
        } = *candidate;
        let (name, granted) = (name.to_owned(), self.access);
        if name != self.name {
            return Err(GrantError::UnknownName { name });
        }
        if index >= self.count {
            return Err(GrantError::TooMany {
                name,
                index,
                count: self.count,
            });
        }
        if !self.kinds.contains(&kind) {
            return Err(GrantError::Kind { name, index, kind });
        }
        if !granted.covers(access) {
            return Err(GrantError::Access {
                name,
                index,
                access,
                granted,
            });
        }
        if kind == Kind::Memfd {
            if let Some(seal) = self.seals.difference(seals).next() {
                return Err(GrantError::Unsealed {
                    name,
                    index,
                    seal: *seal,
                });
            }
        }
        match path {
            None => Ok(()),
            Some(path) if self.paths.iter().any(|pattern| pattern.matches(path)) => Ok(()),
            Some(path) => Err(GrantError::Path {
                name,
                index,
                path: Some(path.display().to_string()),
            }),
        }
    }

    /// Whether the grant's paths cover `path`, which must be absolute and resolved (no `.`, `..` or symlink).
    #[must_use]
    pub fn permits_path(&self, path: &Path) -> bool {
        self.paths.iter().any(|pattern| pattern.matches(path))
    }
}

impl Access {
    /// Whether `other` is no more than this.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self == Self::ReadWrite || self == other
    }
}

impl PathPattern {
    /// The pattern with this text, when it is absolute and has no empty, `.` or `..` component.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let components = text.strip_prefix('/')?;
        let sound = components.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && (part == "**" || !part.contains("**"))
                && !part.contains('\0')
        });
        sound.then(|| Self(text.to_owned()))
    }

    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The deepest directory that everything it covers is in.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        let fixed = self.0.split('/').take_while(|part| !part.contains('*'));
        let mut directory: PathBuf = std::iter::once("/").chain(fixed).collect();
        if !self.0.contains('*') {
            directory.pop();
        }
        directory
    }

    /// Whether it covers `path`. A relative path, or one with `.` or `..`, is never covered.
    #[must_use]
    pub fn matches(&self, path: &Path) -> bool {
        let Some(path) = path.as_os_str().as_bytes().strip_prefix(b"/") else {
            return false;
        };
        let path: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        if path
            .iter()
            .any(|part| part.is_empty() || *part == b"." || *part == b"..")
        {
            return false;
        }
        let pattern: Vec<&[u8]> = self
            .0
            .as_bytes()
            .split(|byte| *byte == b'/')
            .skip(1)
            .collect();
        components_match(&pattern, &path)
    }
}

/// Matching by rows, in time proportional to the product of the lengths.
fn components_match(pattern: &[&[u8]], path: &[&[u8]]) -> bool {
    glob(
        pattern,
        path,
        |part| *part == b"**",
        |part, component| {
            let characters: Vec<u8> = part.to_vec();
            glob(
                &characters,
                component,
                |byte| *byte == b'*',
                |wanted, byte| wanted == byte,
            )
        },
    )
}

/// Whether `items` match `pattern`, in which what `is_star` accepts stands for any run of items.
fn glob<P, T>(
    pattern: &[P],
    items: &[T],
    is_star: impl Fn(&P) -> bool,
    same: impl Fn(&P, &T) -> bool,
) -> bool {
    // reached[i]: the pattern so far matches the first i items.
    let mut reached = vec![false; items.len() + 1];
    if let Some(first) = reached.first_mut() {
        *first = true;
    }
    for part in pattern {
        let mut next = vec![false; items.len() + 1];
        if is_star(part) {
            let mut any = false;
            for (slot, before) in next.iter_mut().zip(&reached) {
                any |= *before;
                *slot = any;
            }
        } else {
            for ((slot, before), item) in next.iter_mut().skip(1).zip(&reached).zip(items) {
                *slot = *before && same(part, item);
            }
        }
        reached = next;
    }
    reached.last().copied().unwrap_or(false)
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kvm => "kvm",
            Self::Memfd => "memfd",
            Self::File => "file",
            Self::Block => "block",
            Self::Tap => "tap",
            Self::Terminal => "terminal",
            Self::Pipe => "pipe",
            Self::Eventfd => "eventfd",
            Self::StreamSocket => "stream-socket",
            Self::SeqpacketSocket => "seqpacket-socket",
            Self::VfioContainer => "vfio-container",
            Self::VfioDevice => "vfio-device",
        })
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::ReadWrite => "read-write",
        })
    }
}

impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Seal => "seal",
            Self::Shrink => "shrink",
            Self::Grow => "grow",
            Self::Write => "write",
            Self::FutureWrite => "future-write",
            Self::Exec => "exec",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        PathPattern::new(pattern).unwrap().matches(Path::new(path))
    }

    #[test]
    fn a_star_stays_in_its_component_and_two_do_not() {
        assert!(matches("/dev/kvm", "/dev/kvm"));
        assert!(!matches("/dev/kvm", "/dev/kvm2"));
        assert!(matches("/srv/*.img", "/srv/a.img"));
        assert!(!matches("/srv/*.img", "/srv/a/b.img"));
        assert!(matches("/srv/**/x*y", "/srv/a/b/xy"));
        assert!(matches("/srv/**/x*y", "/srv/xaay"));
        assert!(!matches("/srv/**/x*y", "/srv/xa"));
        assert!(matches("/**", "/a/b/c"));
    }

    #[test]
    fn a_path_that_is_not_resolved_is_never_covered() {
        for path in [
            "srv/a",
            "/srv/../etc/shadow",
            "/srv/./a",
            "/srv//a",
            "/srv/",
        ] {
            assert!(!matches("/**", path), "{path}");
        }
        for pattern in ["srv/*", "/a/../b", "/a//b", "/a**", "", "/"] {
            assert!(PathPattern::new(pattern).is_none(), "{pattern}");
        }
    }

    #[test]
    fn each_part_of_a_grant_is_required() {
        let grant = Grant {
            name: "ram".into(),
            kinds: [Kind::Memfd].into(),
            access: Access::Read,
            seals: [Seal::Grow, Seal::Shrink].into(),
            count: 2,
            paths: vec![PathPattern::new("/srv/*").unwrap()],
            addresses: BTreeSet::new(),
            why: String::new(),
            line: 1,
        };
        let seals: BTreeSet<Seal> = [Seal::Grow, Seal::Shrink, Seal::Seal].into();
        let one = BTreeSet::from([Seal::Grow]);
        let good = Candidate {
            name: "ram",
            index: 1,
            kind: Kind::Memfd,
            access: Access::Read,
            seals: &seals,
            path: None,
        };
        assert_eq!(grant.permits(&good), Ok(()));
        assert_eq!(
            grant.permits(&Candidate {
                path: Some(Path::new("/srv/a")),
                ..good
            }),
            Ok(())
        );
        let bad = [
            Candidate {
                name: "kvm",
                ..good
            },
            Candidate { index: 2, ..good },
            Candidate {
                kind: Kind::File,
                ..good
            },
            Candidate {
                access: Access::ReadWrite,
                ..good
            },
            Candidate {
                access: Access::Write,
                ..good
            },
            Candidate {
                seals: &one,
                ..good
            },
            Candidate {
                path: Some(Path::new("/etc/a")),
                ..good
            },
        ];
        for candidate in bad {
            assert!(grant.permits(&candidate).is_err(), "{candidate:?}");
        }
    }
}
