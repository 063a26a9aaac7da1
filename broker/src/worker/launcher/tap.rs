//! Taps for network interfaces that come while the guest runs: those that are there, and whose places in sysfs policy grants. A
//! broker whose guest runs can open none.

use baton_ipc::worker::MAX_NET_QUEUES;
use baton_policy::PathPattern;

use crate::devices::taps;
use crate::devices::taps::OpenTap;
use crate::refusal::Result;
use crate::refusal::refused;
use crate::refusal::unfit;
use crate::vm_file::disk::Label;
use crate::vm_file::net::Interface;

/// Which taps may be opened.
#[derive(Debug, Default)]
pub(super) struct Taps(Option<Vec<PathPattern>>);

impl Taps {
    /// Says which, once.
    pub(super) fn set(&mut self, patterns: &[String]) -> std::result::Result<(), String> {
        if self.0.is_some() {
            return Err("the taps were named already".to_owned());
        }
        let parse = |text: &String| {
            PathPattern::new(text).ok_or_else(|| format!("{text:?} is no pattern of paths"))
        };
        self.0 = Some(
            patterns
                .iter()
                .map(parse)
                .collect::<std::result::Result<_, _>>()?,
        );
        Ok(())
    }

    /// Opens one that is there. This process can make none: it has no CAP_NET_ADMIN.
    pub(super) fn open(&self, id: String, tap: String, pairs: u8) -> Result<OpenTap> {
        let wrong = |reason: String| unfit(reason, "");
        let (id, tap) = (
            Label::try_from(id).map_err(wrong)?,
            Interface::try_from(tap).map_err(wrong)?,
        );
        let place = taps::place(&tap);
        if !self.0.iter().flatten().any(|one| one.matches(&place)) {
            return Err(refused(
                format_args!(
                    "the policy that this broker was started under does not grant the tap {}",
                    tap.0
                ),
                "`baton upgrade --broker` starts one under the policy as it is now",
            ));
        }
        if taps::origin(&tap) != place {
            return Err(unfit(
                format_args!("there is no tap {}", tap.0),
                "make it beforehand: ip tuntap add mode tap",
            ));
        }
        if !(1..=MAX_NET_QUEUES).contains(&pairs) {
            return Err(unfit(
                format_args!("{pairs} queues; a network interface has 1 to {MAX_NET_QUEUES}"),
                "",
            ));
        }
        taps::open(&id, &tap, pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_opened_if_that_is_granted_and_there_is_one() {
        let mut taps = Taps::default();
        let open = |taps: &Taps, tap: &str, pairs| {
            let refused = taps.open("net1".to_owned(), tap.to_owned(), pairs);
            refused.unwrap_err().reason
        };
        assert!(open(&taps, "no-such-tap", 1).contains("does not grant the tap"));
        taps.set(&["relative".to_owned()]).unwrap_err();
        taps.set(&["/sys/class/net/no-*".to_owned()]).unwrap();
        taps.set(&["/sys/class/net/*".to_owned()]).unwrap_err();
        assert!(open(&taps, "lo", 1).contains("does not grant the tap lo"));
        assert!(open(&taps, "no-such-tap", 1).contains("there is no tap"));
        assert!(open(&taps, "no/../../lo", 1).contains("no interface name"));
        let mut all = Taps::default();
        all.set(&["/sys/class/net/*".to_owned()]).unwrap();
        assert!(open(&all, "lo", 0).contains("0 queues"));
        assert!(open(&all, "lo", 9).contains("9 queues"));
        // An interface of another kind.
        assert!(open(&all, "lo", 1).contains("lo"));
    }
}
