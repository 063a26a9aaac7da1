//! What in a policy could be left out without a change of what it permits: conditions that others cover, patterns within others,
//! entries that say what an earlier one says. None of it is an error.
//!
//! Covered is decided exactly, over all arguments. Whether any workload needs a rule is another question, which no text
//! answers; and what is broad is [`crate::check`]'s to say.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::condition::{self, Conjunction, cover};
use crate::descriptors::PathPattern;
use crate::policy::{Policy, Role, Rule};

/// One thing that could be left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Lint {
    /// The line of the file, from 1, where an entry has one.
    pub line: Option<usize>,
    /// What the matter is.
    pub what: String,
}

impl Policy {
    /// Everything that could be left out, by line.
    #[must_use]
    pub fn lint(&self) -> Vec<Lint> {
        let mut found = self.approvals_twice();
        for (index, rule) in self.rules.iter().enumerate() {
            self.covered_alternatives(index, rule, &mut found);
        }
        self.patterns_within(&mut found);
        self.access_twice(&mut found);
        found.sort();
        found
    }

    /// Alternatives of a rule that other alternatives for the same call cover, in each of its roles.
    fn covered_alternatives(&self, index: usize, rule: &Rule, found: &mut Vec<Lint>) {
        for (number, alternative) in rule.alternatives.iter().enumerate() {
            let covered_for = |role: &Role| {
                let others = self.others((index, number), alternative, rule, *role);
                cover::covered(alternative, &others)
            };
            if rule.roles.iter().all(covered_for) {
                let when = condition::describe(rule.call, alternative);
                found.push(Lint {
                    line: Some(rule.line),
                    what: format!("{} when {when}: other conditions let it through", rule.call),
                });
            }
        }
    }

    /// What else `role` has for the call of a rule; of two alternatives that say the same, the first stays.
    fn others(
        &self,
        place: (usize, usize),
        alternative: &Conjunction,
        rule: &Rule,
        role: Role,
    ) -> Vec<Conjunction> {
        let rules = self.rules.iter().enumerate();
        rules
            .filter(|(_, other)| other.call == rule.call && other.roles.contains(&role))
            .flat_map(|(at, other)| {
                let numbered = other.alternatives.iter().enumerate();
                numbered.map(move |(number, one)| ((at, number), one))
            })
            .filter(|(at, one)| *at != place && (*one != alternative || *at < place))
            .map(|(_, one)| one.clone())
            .collect()
    }

    fn patterns_within(&self, found: &mut Vec<Lint>) {
        for grant in &self.descriptors {
            for (at, pattern) in grant.paths.iter().enumerate() {
                let mut others = grant.paths.iter().enumerate();
                let wider = others.find(|(other, wide)| {
                    *other != at && is_within(pattern, wide) && (pattern != *wide || *other < at)
                });
                if let Some((_, wide)) = wider {
                    let (name, text, wide) = (&grant.name, pattern.as_str(), wide.as_str());
                    found.push(Lint {
                        line: Some(grant.line),
                        what: format!("the descriptor {name:?} has {text}, which {wide} covers"),
                    });
                }
            }
        }
    }

    fn access_twice(&self, found: &mut Vec<Lint>) {
        for (at, rule) in self.access.0.iter().enumerate() {
            let mut earlier = self.access.0.iter().take(at);
            let first = earlier.find(|first| {
                rule.rights.is_subset(&first.rights)
                    && rule.users.is_subset(&first.users)
                    && rule.groups.is_subset(&first.groups)
            });
            if let Some(first) = first {
                found.push(Lint {
                    line: Some(rule.line),
                    what: format!("line {} lets all of these do all of this", first.line),
                });
            }
        }
    }

    fn approvals_twice(&self) -> Vec<Lint> {
        let numbered = self.approvals.iter().enumerate();
        let again = numbered.filter(|(at, approval)| {
            let mut earlier = self.approvals.iter().take(*at);
            earlier.any(|first| first.worker == approval.worker)
        });
        again
            .map(|(_, approval)| Lint {
                line: None,
                what: format!("the build {} is approved of twice", approval.worker),
            })
            .collect()
    }
}

/// Whether every path of one pattern is of the other. Patterns with stars are only said to be within `/**` and themselves.
fn is_within(pattern: &PathPattern, wide: &PathPattern) -> bool {
    let text = pattern.as_str();
    pattern == wide
        || wide.as_str() == "/**"
        || !text.contains('*') && wide.matches(Path::new(text))
}

impl fmt::Display for Lint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            None => f.write_str(&self.what),
            Some(line) => write!(f, "line {line}: {}", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BUILTIN;

    /// What is found in the built-in policy with one thing replaced.
    fn with(old: &str, new: &str) -> Vec<String> {
        assert!(BUILTIN.contains(old), "{old}");
        let policy = Policy::parse(&BUILTIN.replacen(old, new, 1), "test").unwrap();
        policy.lint().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_files_of_this_repository_say_nothing_twice() {
        assert_eq!(Policy::builtin().unwrap().lint(), []);
        assert_eq!(Policy::front().unwrap().lint(), []);
    }

    #[test]
    fn a_condition_within_another_is_named_and_the_wider_one_is_not() {
        let rule = r#"{ call = "mprotect", when = "prot lacks PROT_EXEC""#;
        let narrow = r#"{ call = "mprotect", when = "prot is PROT_READ", why = "narrow" },"#;
        let found = with(rule, &format!("{narrow}\n    {rule}"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("mprotect when prot is PROT_READ"),
            "{found:?}"
        );
    }

    #[test]
    fn a_condition_that_two_others_cover_together_is_named() {
        // Neither of them covers it alone.
        let rule = r#"{ call = "mprotect", when = "prot lacks PROT_EXEC""#;
        let halves = r#"{ call = "lseek", when = "whence lacks 1", why = "even ones" },
            { call = "lseek", when = "whence has 1", why = "odd ones" },
            { call = "lseek", when = "whence is SEEK_DATA", why = "one of them" },"#;
        let lseek = BUILTIN
            .lines()
            .find(|line| line.contains("call = \"lseek\""))
            .unwrap();
        let text = BUILTIN
            .replace(lseek, "")
            .replacen(rule, &format!("{halves}\n    {rule}"), 1);
        let found = Policy::parse(&text, "test").unwrap().lint();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].what.contains("SEEK_DATA"), "{found:?}");
    }

    #[test]
    fn a_condition_that_one_role_needs_stays() {
        // `build` and `io` have it, `vcpu` has not.
        let topic = "[[allow]]\ntopic = \"disks, network, console\"";
        let more = r#"[[allow]]
topic = "again"
to = ["vcpu"]
calls = [{ call = "fallocate", when = "mode is FALLOC_FL_PUNCH_HOLE|FALLOC_FL_KEEP_SIZE", why = "test" }]
"#;
        assert_eq!(with(topic, &format!("{more}\n{topic}")), [""; 0]);
    }

    #[test]
    fn a_path_within_another_is_named() {
        let found = with(
            r#"paths = ["/sys/class/net/*", "/dev/net/tun"]"#,
            r#"paths = ["/sys/class/net/*", "/sys/class/net/tap0", "/dev/net/tun", "/dev/net/tun"]"#,
        );
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("/dev/net/tun covers"), "{found:?}");
        assert!(found[1].contains("/sys/class/net/* covers"), "{found:?}");
    }

    #[test]
    fn a_right_that_is_given_twice_is_named() {
        let access = |rights: &str, users: &str| {
            format!("[[access]]\nto = [{rights}]\nusers = [{users}]\nwhy = \"test\"\n")
        };
        let both = access("\"view\", \"power\"", "1000, 1001") + &access("\"view\"", "1001");
        let found = with("[namespaces]", &format!("{both}\n[namespaces]"));
        assert_eq!(found.len(), 1, "{found:?}");
        let other = access("\"view\"", "1000") + &access("\"view\"", "1001");
        assert_eq!(
            with("[namespaces]", &format!("{other}\n[namespaces]")),
            [""; 0]
        );
    }
}
