//! A policy and its filters in the forms that other programs read.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::bpf;
use crate::compile::Compiled;
use crate::explain::Explanation;
use crate::policy::{Policy, Role};
use crate::program::Program;

/// A policy and its filters as one JSON document.
#[derive(Clone, Debug, Serialize)]
pub struct Document {
    /// The schema of policies that it was read by.
    pub schema: u32,
    /// All of the policy, resolved.
    pub policy: Explanation,
    /// The digest of all filters together.
    pub filters_digest: String,
    /// The filters of each role, in the order in which they are installed; those of the build phase are below
    /// each of the others.
    pub filters: BTreeMap<Role, Vec<FilterDocument>>,
}

/// One filter.
#[derive(Clone, Debug, Serialize)]
pub struct FilterDocument {
    /// How many instructions it has.
    pub instructions: usize,
    /// The digest of its bytes.
    pub sha256: String,
    /// Its bytes in hexadecimal, eight an instruction (`struct sock_filter`, little-endian).
    pub bytes: String,
}

/// One filter with where it belongs.
#[derive(Clone, Copy, Debug)]
pub struct NamedFilter<'a> {
    /// The role that it is installed for.
    pub role: Role,
    /// Which of the role's, from 0.
    pub index: usize,
    /// The filter. [`Program::as_bytes`] is what the kernel takes, and other tools read.
    pub program: &'a Program,
}

impl Compiled {
    /// Every filter, the build phase's first.
    pub fn filters(&self) -> impl Iterator<Item = NamedFilter<'_>> {
        let build = self
            .build
            .iter()
            .enumerate()
            .map(|(index, program)| (Role::Build, index, program));
        let steady = self.roles.iter().map(|(role, program)| (*role, 0, program));
        build
            .chain(steady)
            .map(|(role, index, program)| NamedFilter {
                role,
                index,
                program,
            })
    }

    /// Every filter disassembled, each under a heading.
    #[must_use]
    pub fn disassemble(&self) -> String {
        let one = |filter: NamedFilter<'_>| {
            let NamedFilter {
                role,
                index,
                program,
            } = filter;
            let (len, digest) = (program.len(), program.digest());
            format!(
                "; {role}, filter {index}: {len} instructions, sha256 {digest}\n{}",
                bpf::disassemble(program)
            )
        };
        self.filters().map(one).collect::<Vec<_>>().join("\n")
    }
}

impl Policy {
    /// The policy and its filters, for JSON.
    #[must_use]
    pub fn document(&self, compiled: &Compiled) -> Document {
        let mut filters: BTreeMap<Role, Vec<FilterDocument>> = BTreeMap::new();
        for NamedFilter { role, program, .. } in compiled.filters() {
            filters.entry(role).or_default().push(FilterDocument {
                instructions: program.len(),
                sha256: program.digest().to_string(),
                bytes: program
                    .as_bytes()
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect(),
            });
        }
        Document {
            schema: crate::SCHEMA,
            policy: self.explain(),
            filters_digest: compiled.digest().to_string(),
            filters,
        }
    }
}
