//! Who may ask a broker for what. The broker knows its clients from the kernel (SO_PEERCRED, unix(7)).

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What a client may be allowed to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Right {
    /// To see how the VM is, and to have it audited.
    View,
    /// To pause, reset and end the guest, and to type into it.
    Power,
    /// To replace its worker.
    Upgrade,
    /// To give its guest to another broker or into a file, and to take it from there.
    Transfer,
    /// To change its devices.
    Devices,
    /// To approve of a worker that may do more than the one that it replaces.
    Approve,
}

/// One rule: these users, and the members of these groups, may ask for this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRule {
    /// What.
    pub rights: BTreeSet<Right>,
    /// Numeric user ids.
    pub users: BTreeSet<u32>,
    /// Numeric group ids.
    pub groups: BTreeSet<u32>,
    /// The reason.
    pub why: String,
    /// The line of the file.
    pub line: usize,
}

/// All rules. Root and the broker's own user may ask for everything, whatever they say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access(pub Vec<AccessRule>);

impl Access {
    /// Whether somebody who is in these groups may ask for this.
    #[must_use]
    pub fn permits(&self, right: Right, user: u32, groups: &[u32]) -> bool {
        self.0.iter().any(|rule| {
            rule.rights.contains(&right)
                && (rule.users.contains(&user)
                    || groups.iter().any(|group| rule.groups.contains(group)))
        })
    }

    /// Whether anybody but root and the broker's user may ask for anything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.0.is_empty()
    }

    /// Who has which right, one subject a line, for comparing policies: `user 7 may power`.
    #[must_use]
    pub fn sentences(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for rule in &self.0 {
            for right in &rule.rights {
                all.extend(rule.users.iter().map(|id| format!("user {id} may {right}")));
                all.extend(
                    rule.groups
                        .iter()
                        .map(|id| format!("group {id} may {right}")),
                );
            }
        }
        all
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::View => "view",
            Self::Power => "power",
            Self::Upgrade => "upgrade",
            Self::Transfer => "transfer",
            Self::Devices => "devices",
            Self::Approve => "approve",
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::Policy;
    use crate::diff::{Difference, Direction};

    use super::*;

    fn with(rules: &str) -> Policy {
        Policy::parse(&format!("{}\n{rules}", crate::BUILTIN), "test").unwrap()
    }

    const OPERATORS: &str =
        "[[access]]\nto = [\"view\", \"power\"]\nusers = [7]\ngroups = [40]\nwhy = \"operators\"\n";

    #[test]
    fn only_who_is_named_may_and_only_what_is_named() {
        let policy = with(OPERATORS);
        assert!(policy.access.permits(Right::View, 7, &[]));
        assert!(policy.access.permits(Right::Power, 8, &[1, 40]));
        assert!(!policy.access.permits(Right::Upgrade, 7, &[40]));
        assert!(!policy.access.permits(Right::View, 8, &[7]));
        assert!(!with("").access.permits(Right::View, 7, &[40]));
        assert!(!with("").access.is_open());
    }

    #[test]
    fn a_rule_without_a_reason_or_without_anybody_does_not_parse() {
        for bad in [
            OPERATORS.replace("why = \"operators\"\n", ""),
            OPERATORS.replace("\"operators\"", "\"\""),
            OPERATORS.replace("[7]", "[]").replace("[40]", "[]"),
            OPERATORS.replace("\"view\", \"power\"", ""),
            OPERATORS.replace("\"power\"", "\"everything\""),
            OPERATORS.replace("[7]", "[-1]"),
        ] {
            let text = format!("{}\n{bad}", crate::BUILTIN);
            assert!(Policy::parse(&text, "test").is_err(), "{bad}");
        }
    }

    #[test]
    fn more_people_is_wider_and_another_order_is_nothing() {
        let (none, some) = (with(""), with(OPERATORS));
        let between = |old, new| Difference::between(old, new).changes;
        let widened = between(&none, &some);
        assert_eq!(widened.len(), 4);
        assert!(
            widened
                .iter()
                .all(|one| one.direction == Direction::Widens && one.subject == "access")
        );
        assert!(
            between(&some, &none)
                .iter()
                .all(|one| one.direction == Direction::Narrows)
        );
        let split = "[[access]]\nto = [\"power\", \"view\"]\ngroups = [40]\nwhy = \"operators\"\n\
                     [[access]]\nto = [\"view\", \"power\"]\nusers = [7]\nwhy = \"operators\"\n";
        assert!(between(&some, &with(split)).is_empty());
    }
}
