//! From the text of a policy to a [`Policy`], or to an error that says where and what to do.
//!
//! TOML with unknown fields refused gives the tables; everything that TOML cannot say (names of calls, conditions,
//! reasons, rules that would cancel each other, what no policy may permit) is checked here. What parses can be
//! compiled.

mod error;
mod file;
mod rules;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

pub use error::{Place, PolicyError, Problem};
pub(crate) use file::OwnTopic;
use file::{
    File, FileAccess, FileApproval, FileGrant, FileIds, FileIo, FileKey, FileLimit, FileRole,
    FileWorkers,
};
use source::{Source, one_line};

use crate::access::{Access, AccessRule};
use crate::capabilities::Capabilities;
use crate::cgroup::CgroupPolicy;
use crate::descriptors::{Grant, Kind, PathPattern};
use crate::digest::{Digest, DigestError};
use crate::io::{IoPolicy, MIN_CONSOLE_FILE};
use crate::landlock;
use crate::policy::{
    Approval, Ids, LandlockPolicy, Policy, Refusal, Role, RolePolicy, Rule, SCHEMA, Threads,
    Workers,
};
use crate::rlimits::{Limit, Resource, Rlimits};
use crate::signature::SigningKey;
use crate::trusted;

/// The longest policy that is read, in bytes. The built-in one has a twentieth of that.
pub const MAX_TEXT: u64 = 512 * 1024;

impl Policy {
    /// Reads the policy in `path`, which must belong to root or to the caller and be writable by nobody else.
    ///
    /// # Errors
    ///
    /// When the file is not to be trusted or cannot be read, and as [`Policy::parse`].
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let origin = path.display().to_string();
        match trusted::read(path, MAX_TEXT) {
            Ok(text) => policy(&text, &origin),
            Err(error) => Err(PolicyError {
                origin,
                place: None,
                problem: Box::new(error.into()),
            }),
        }
    }
}

/// See [`Policy::parse`].
pub(crate) fn policy(text: &str, origin: &str) -> Result<Policy, PolicyError> {
    let source = Source { text, origin };
    schema(&source)?;
    let file: File = toml::from_str(text).map_err(|error| source.toml(&error))?;

    let mut refusals: Vec<Refusal> = Vec::new();
    for entry in file.refuse {
        refusals.push(rules::refusal(&source, entry, &refusals)?);
    }
    let roles = roles(&source, file.roles)?;
    let rules = rules::rules(&source, file.allow, &refusals)?;
    let mut descriptors: Vec<Grant> = Vec::new();
    for entry in file.descriptor {
        descriptors.push(grant(&source, entry, &descriptors)?);
    }
    let name = one_line(file.name.get_ref());
    if name.is_empty() {
        return Err(source.error(file.name.span(), Problem::Empty("name")));
    }
    source.plain(file.name.span(), &name)?;
    Ok(Policy {
        name,
        origin: origin.to_owned(),
        digest: Digest::of(text.as_bytes()),
        workers: workers(&source, file.workers)?,
        approvals: approvals(&source, file.approve)?,
        ids: ids(&source, &file.ids)?,
        access: access(&source, file.access)?,
        namespaces: file.namespaces.required.into_iter().collect(),
        threads: Threads {
            headroom: file.threads.headroom,
        },
        cgroup: match &file.cgroup {
            Some(file) => CgroupPolicy {
                memory_headroom: limit(&source, &file.memory_headroom)?,
                cpu_headroom: limit(&source, &file.cpu_headroom)?,
            },
            None => CgroupPolicy::default(),
        },
        io: io(&source, file.io.as_ref())?,
        rlimits: rlimits(&source, file.rlimits)?,
        capabilities: capabilities(&source, &file.capabilities.keep)?,
        landlock: floor(&source, &file.landlock.floor_abi)?,
        descriptors,
        roles,
        refusals,
        rules,
        learn: file
            .learn
            .map(|learn| source.reason(learn.why))
            .transpose()?,
    })
}

/// The rules of the broker's own file, which are of its one thread.
pub(crate) fn own_rules(text: &str, topics: Vec<OwnTopic>) -> Result<Vec<Rule>, PolicyError> {
    let origin = "built-in policy of the broker";
    rules::own(&Source { text, origin }, topics)
}

/// The version comes first, so that a newer file is refused for its version and not for its fields.
fn schema(source: &Source<'_>) -> Result<(), PolicyError> {
    #[derive(Deserialize)]
    struct Version {
        schema: Spanned<i64>,
    }
    let version: Version = toml::from_str(source.text).map_err(|error| source.toml(&error))?;
    if *version.schema.get_ref() == i64::from(SCHEMA) {
        return Ok(());
    }
    Err(source.error(
        version.schema.span(),
        Problem::Schema(version.schema.into_inner()),
    ))
}

fn workers(source: &Source<'_>, file: FileWorkers) -> Result<Workers, PolicyError> {
    let digests = file.digests.iter().map(|text| digest(source, text));
    let keys = file.key.into_iter().map(|FileKey { minisign, why }| {
        SigningKey::new(minisign.get_ref(), source.reason(why)?)
            .map_err(|error| source.error(minisign.span(), error.into()))
    });
    Ok(Workers {
        digests: digests.collect::<Result<_, _>>()?,
        directory: file.directory,
        beside_broker: file.beside_broker,
        keys: keys.collect::<Result<_, _>>()?,
    })
}

fn digest(source: &Source<'_>, text: &Spanned<String>) -> Result<Digest, PolicyError> {
    text.get_ref()
        .parse()
        .map_err(|error: DigestError| source.error(text.span(), error.into()))
}

fn approvals(source: &Source<'_>, file: Vec<FileApproval>) -> Result<Vec<Approval>, PolicyError> {
    let approvals = file.into_iter().map(|FileApproval { worker, why }| {
        Ok(Approval {
            worker: digest(source, &worker)?,
            why: source.reason(why)?,
        })
    });
    approvals.collect()
}

fn ids(source: &Source<'_>, file: &Spanned<FileIds>) -> Result<Ids, PolicyError> {
    let FileIds {
        first,
        count,
        unprivileged_broker,
    } = *file.get_ref();
    let range = || -> Option<Ids> {
        // 2^32 - 1 is "no id" to the kernel.
        let after = first.checked_add(count)?;
        (after < u32::MAX).then_some(())?;
        Some(Ids {
            first: NonZeroU32::new(first)?,
            count: NonZeroU32::new(count)?,
            unprivileged_broker,
        })
    };
    range().ok_or_else(|| source.error(file.span(), Problem::IdRange { first, count }))
}

fn access(source: &Source<'_>, file: Vec<FileAccess>) -> Result<Access, PolicyError> {
    let rules = file.into_iter().map(|rule| {
        let span = rule.to.span();
        if rule.to.get_ref().is_empty() {
            return Err(source.error(span, Problem::Empty("to")));
        }
        if rule.users.is_empty() && rule.groups.is_empty() {
            return Err(source.error(span, Problem::Empty("users")));
        }
        Ok(AccessRule {
            line: source.line(&span),
            rights: rule.to.into_inner(),
            users: rule.users,
            groups: rule.groups,
            why: source.reason(rule.why)?,
        })
    });
    rules.collect::<Result<_, _>>().map(Access)
}

fn rlimits(
    source: &Source<'_>,
    file: BTreeMap<Resource, Spanned<FileLimit>>,
) -> Result<Rlimits, PolicyError> {
    let mut limits = Rlimits::default();
    for (resource, value) in file {
        if resource == Resource::Nproc {
            return Err(source.error(value.span(), Problem::NprocGiven));
        }
        limits.set(resource, limit(source, &value)?);
    }
    Ok(limits)
}

fn limit(source: &Source<'_>, value: &Spanned<FileLimit>) -> Result<Limit, PolicyError> {
    let bad = |text: String| source.error(value.span(), Problem::BadLimit(text));
    match value.get_ref() {
        FileLimit::At(number) => u64::try_from(*number)
            .map(Limit::At)
            .map_err(|_| bad(number.to_string())),
        FileLimit::Word(word) if word == "unlimited" => Ok(Limit::Unlimited),
        FileLimit::Word(word) => Err(bad(word.clone())),
    }
}

fn io(source: &Source<'_>, file: Option<&FileIo>) -> Result<IoPolicy, PolicyError> {
    let Some(file) = file else {
        return Ok(IoPolicy::default());
    };
    let console_file = limit(source, &file.console_file)?;
    if console_file < Limit::At(MIN_CONSOLE_FILE) {
        let text =
            format!("{console_file}; a console's file has {MIN_CONSOLE_FILE} bytes at least");
        return Err(source.error(file.console_file.span(), Problem::BadLimit(text)));
    }
    Ok(IoPolicy {
        console_file,
        disk_bytes: limit(source, &file.disk_bytes)?,
        disk_operations: limit(source, &file.disk_operations)?,
        net_bytes: limit(source, &file.net_bytes)?,
        net_operations: limit(source, &file.net_operations)?,
    })
}

fn capabilities(
    source: &Source<'_>,
    keep: &[Spanned<String>],
) -> Result<Capabilities, PolicyError> {
    keep.iter().try_fold(Capabilities::NONE, |all, name| {
        all.with_name(name.get_ref()).ok_or_else(|| {
            source.error(
                name.span(),
                Problem::UnknownCapability(name.get_ref().clone()),
            )
        })
    })
}

fn floor(source: &Source<'_>, floor: &Spanned<u32>) -> Result<LandlockPolicy, PolicyError> {
    let floor_abi = *floor.get_ref();
    match landlock::floor_abi(floor_abi) {
        Some(_) => Ok(LandlockPolicy { floor_abi }),
        None => Err(source.error(floor.span(), Problem::LandlockFloor(floor_abi))),
    }
}

fn grant(source: &Source<'_>, file: FileGrant, before: &[Grant]) -> Result<Grant, PolicyError> {
    let span = file.name.span();
    let name = file.name.into_inner();
    if name.is_empty() {
        return Err(source.error(span, Problem::Empty("name")));
    }
    if let Some(first) = before.iter().find(|grant| grant.name == name) {
        let what = format!("the descriptor {name:?}");
        return Err(source.error(
            span,
            Problem::Twice {
                what,
                first: first.line,
            },
        ));
    }
    let kinds: BTreeSet<Kind> = file.kinds.get_ref().iter().copied().collect();
    if kinds.is_empty() {
        return Err(source.error(file.kinds.span(), Problem::Empty("kinds")));
    }
    if !file.seals.is_empty() && !kinds.contains(&Kind::Memfd) {
        return Err(source.error(
            span,
            Problem::Inconsistent("`seals` are of memfds, and this is none"),
        ));
    }
    let paths = file.paths.iter().map(|pattern| {
        PathPattern::new(pattern.get_ref()).ok_or_else(|| {
            source.error(pattern.span(), Problem::BadPath(pattern.get_ref().clone()))
        })
    });
    let addresses = file.addresses.iter().map(|address| {
        let text = address.get_ref();
        text.parse()
            .map_err(|_| source.error(address.span(), Problem::BadAddress(text.clone())))
    });
    Ok(Grant {
        name,
        addresses: addresses.collect::<Result<_, _>>()?,
        kinds,
        access: file.access,
        seals: file.seals,
        count: file.count.get(),
        paths: paths.collect::<Result<_, _>>()?,
        why: source.reason(file.why)?,
        line: source.line(&span),
    })
}

fn roles(
    source: &Source<'_>,
    file: BTreeMap<Role, FileRole>,
) -> Result<BTreeMap<Role, RolePolicy>, PolicyError> {
    let mut roles = BTreeMap::new();
    for (role, FileRole { violation, why }) in file {
        roles.insert(
            role,
            RolePolicy {
                violation,
                why: source.reason(why)?,
            },
        );
    }
    match Role::ALL.into_iter().find(|role| !roles.contains_key(role)) {
        None => Ok(roles),
        Some(role) => Err(PolicyError {
            origin: source.origin.to_owned(),
            place: None,
            problem: Box::new(Problem::MissingRole(role)),
        }),
    }
}
