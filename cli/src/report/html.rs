//! One page that holds everything itself: no script, nothing from elsewhere, light and dark, for wide and narrow windows and
//! for paper. Findings come first.

use std::fmt::Write;

use baton_ipc::control::AuditDescriptor;
use baton_ipc::control::Evidence;
use baton_policy::Policy;
use baton_policy::Role;
use baton_policy::explain::CallExplanation;
use baton_policy::explain::Outcome;
use baton_policy::explain::RoleAnswer;

use super::Audited;
use super::drawing;
use super::timeline;
use crate::report::word;
use crate::units;

const STYLE: &str = include_str!("style.css");

/// Text inside markup. Everything that is not this program's own goes through here.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// A time for people: to the second.
pub(super) fn time(ms: u64) -> String {
    let text = units::timestamp(ms);
    format!("{} UTC", text.get(..19).unwrap_or(&text).replace('T', " "))
}

/// The page.
pub(crate) fn page(all: &[Audited]) -> String {
    let title = match all {
        [one] => format!("Audit of {}", escape(&one.vm)),
        all => format!("Audit of {} VMs", all.len()),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">\
         <style>{STYLE}</style></head><body>\n"
    );
    if all.len() > 1 {
        contents(&mut out, all);
    }
    for audited in all {
        vm(&mut out, audited);
    }
    let _ = writeln!(
        out,
        "<footer>baton {} · every line above that is not marked <em>by construction</em> comes from the kernel’s own records</footer></body></html>",
        env!("CARGO_PKG_VERSION")
    );
    out
}

fn contents(out: &mut String, all: &[Audited]) {
    let against = all.iter().filter(|audited| !audited.is_proven()).count();
    let _ = write!(
        out,
        "<nav><h1>{} VMs, {against} with findings</h1><ul>",
        all.len()
    );
    for audited in all {
        let (style, words) = verdict(audited);
        let name = escape(&audited.vm);
        let _ = write!(
            out,
            "<li><a href=\"#{name}\">{name}</a> <span class=\"badge {style}\">{words}</span></li>"
        );
    }
    out.push_str("</ul></nav>");
}

fn verdict(audited: &Audited) -> (&'static str, String) {
    match audited.report.findings.len() {
        _ if audited.is_proven() => ("good", "proven".to_owned()),
        1 => ("bad", "1 finding".to_owned()),
        count => ("bad", format!("{count} findings")),
    }
}

fn vm(out: &mut String, audited: &Audited) {
    let report = &audited.report;
    let name = escape(&audited.vm);
    let (style, words) = verdict(audited);
    let _ = write!(
        out,
        "<main id=\"{name}\"><header><p class=\"eyebrow\">Confinement audit</p><h1>{name} <span class=\"badge large {style}\">{words}</span></h1>\
         <dl><div><dt>audited</dt><dd><time>{}</time></dd></div><div><dt>worker</dt><dd>process {}, generation {}</dd></div>\
         <div><dt>binary</dt><dd><code title=\"{digest}\">{}</code></dd></div><div><dt>policy</dt><dd>{} <code title=\"{policy}\">{}</code></dd></div>\
         <div><dt>longest stop of a thread</dt><dd>{}</dd></div></dl></header>",
        time(audited.time),
        report.worker_pid,
        report.generation,
        escape(units::short_digest(&report.worker_digest)),
        escape(&report.policy),
        escape(units::short_digest(&report.policy_digest)),
        units::microseconds(report.pause_us),
        digest = escape(&report.worker_digest),
        policy = escape(&report.policy_digest),
    );
    findings(out, audited);
    let _ = write!(
        out,
        "<section><h2>Who holds which descriptor</h2>{}",
        drawing::figure(audited)
    );
    descriptors(out, &report.descriptors);
    out.push_str("</section><section><h2>What was compared</h2>");
    checks(out, audited);
    threads(out, audited);
    out.push_str("</section><section><h2>Upgrades</h2>");
    out.push_str(&timeline::section(&audited.upgrades));
    out.push_str("</section><section><h2>Roles and system calls</h2>");
    match &audited.policy {
        Some(policy) => calls(out, policy),
        None => out.push_str(
            "<p class=\"dim\">The policy’s file cannot be read here, or has changed since this worker was started.</p>",
        ),
    }
    out.push_str("</section></main>");
}

fn findings(out: &mut String, audited: &Audited) {
    let report = &audited.report;
    out.push_str("<section><h2>Findings</h2>");
    if report.findings.is_empty() {
        out.push_str(
            "<p class=\"nothing\">None. Everything that was compared is as the policy says.</p>",
        );
    } else {
        out.push_str("<ul class=\"findings\">");
        for finding in &report.findings {
            let _ = write!(
                out,
                "<li><p><span class=\"badge bad\">{}</span> <b>{}</b></p><dl><div><dt>declared</dt><dd>{}</dd></div><div><dt>found</dt><dd>{}</dd></div></dl></li>",
                escape(&finding.rule),
                escape(&finding.subject),
                escape(&finding.declared),
                escape(&finding.found)
            );
        }
        out.push_str("</ul>");
    }
    if !report.weaker.is_empty() {
        out.push_str("<h3>Weaker here than it could be</h3><ul class=\"weaker\">");
        for weaker in &report.weaker {
            let _ = write!(out, "<li>{}</li>", escape(weaker));
        }
        out.push_str("</ul>");
    }
    out.push_str("</section>");
}

fn descriptors(out: &mut String, descriptors: &[AuditDescriptor]) {
    let _ = write!(
        out,
        "<details><summary>All {} descriptors</summary><div class=\"scroll\"><table><thead><tr><th class=\"n\">fd</th><th>grant</th><th>kind</th><th>access</th><th>object</th><th>seals</th><th>target</th></tr></thead><tbody>",
        descriptors.len()
    );
    for one in descriptors {
        let class = if one.grant == "unexplained" {
            " class=\"bad\""
        } else {
            ""
        };
        let (device, inode) = one.identity;
        let _ = write!(
            out,
            "<tr{class}><td class=\"n\">{}</td><td>{}</td><td>{}</td><td>{}</td><td><code>{device:x}:{inode}</code></td><td>{}</td><td><code>{}</code></td></tr>",
            one.fd,
            escape(&one.grant),
            word(&one.kind),
            word(&one.access),
            escape(&one.seals.join(", ")),
            escape(&one.target)
        );
    }
    out.push_str("</tbody></table></div></details>");
}

fn checks(out: &mut String, audited: &Audited) {
    out.push_str("<div class=\"scroll\"><table class=\"checks\"><tbody>");
    for check in &audited.report.checks {
        let (style, words) = match check.evidence {
            Evidence::Kernel => ("good", "kernel’s record"),
            Evidence::ByConstruction => ("dim", "by construction"),
            Evidence::Against => ("bad", "otherwise"),
        };
        let _ = write!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td><span class=\"badge {style}\">{words}</span></td></tr>",
            escape(&check.what),
            escape(&check.found)
        );
    }
    out.push_str("</tbody></table></div>");
}

fn threads(out: &mut String, audited: &Audited) {
    out.push_str("<h3>Threads</h3><div class=\"scroll\"><table><thead><tr><th class=\"n\">thread</th><th>role, by its filter</th><th class=\"n\">filters</th><th>proof</th></tr></thead><tbody>");
    for thread in &audited.report.threads {
        let _ = write!(
            out,
            "<tr><td class=\"n\">{}</td><td>{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            thread.tid,
            escape(&thread.role),
            thread.filters,
            escape(&thread.proof)
        );
    }
    out.push_str("</tbody></table></div>");
}

fn calls(out: &mut String, policy: &Policy) {
    let explanation = policy.explain();
    let roles: Vec<Role> = explanation.roles.iter().map(|role| role.role).collect();
    out.push_str(
        "<p class=\"dim\">Threads of one worker share their memory, so what a worker may do is the <em>union</em> of the columns.</p>\
         <p class=\"legend\"><span><i class=\"dot full\"></i>with any arguments</span><span><i class=\"dot half\"></i>on conditions</span>\
         <span><i class=\"dot error\"></i>answered with an error</span><span><i class=\"dot none\"></i>never executed</span></p><div class=\"matrix\">",
    );
    // Three tables side by side where there is room.
    let height = explanation.calls.len().div_ceil(3).max(1);
    for column in explanation.calls.chunks(height) {
        out.push_str("<table><thead><tr><th>call</th>");
        for role in &roles {
            let _ = write!(out, "<th class=\"c\">{role}</th>");
        }
        out.push_str("</tr></thead><tbody>");
        for call in column {
            row(out, call, &roles);
        }
        out.push_str("</tbody></table>");
    }
    out.push_str("</div><details><summary>Every condition, with its reason</summary><dl class=\"conditions\">");
    for call in &explanation.calls {
        conditions(out, call);
    }
    out.push_str("</dl></details>");
}

fn row(out: &mut String, call: &CallExplanation, roles: &[Role]) {
    let _ = write!(
        out,
        "<tr><th scope=\"row\"><code>{}</code></th>",
        escape(&call.call)
    );
    for role in roles {
        let answer = call.answers.iter().find(|answer| answer.role == *role);
        let (class, words) = match answer.map(|answer| &answer.outcome) {
            Some(Outcome::Allowed { rules }) if rules.iter().any(|rule| rule.when.is_none()) => {
                ("full", "allowed")
            }
            Some(Outcome::Allowed { .. }) => ("half", "on conditions"),
            Some(Outcome::Refused { .. }) => ("error", "error"),
            Some(Outcome::Violation { .. }) | None => ("none", "never"),
        };
        let _ = write!(
            out,
            "<td class=\"c\"><i class=\"dot {class}\" title=\"{words}\"></i><span class=\"sr\">{words}</span></td>"
        );
    }
    out.push_str("</tr>");
}

fn conditions(out: &mut String, call: &CallExplanation) {
    let mut lines: Vec<(usize, String, String, Vec<String>)> = Vec::new();
    for RoleAnswer { role, outcome } in &call.answers {
        let said = match outcome {
            Outcome::Allowed { rules } => rules
                .iter()
                .map(|rule| {
                    (
                        rule.line,
                        rule.when.clone().unwrap_or_default(),
                        rule.why.clone(),
                    )
                })
                .collect(),
            Outcome::Refused { errno, why, line } => {
                vec![(*line, format!("answered {errno}"), why.clone())]
            }
            Outcome::Violation { .. } => Vec::new(),
        };
        for (line, when, why) in said {
            match lines.iter_mut().find(|known| known.0 == line) {
                Some(known) => known.3.push(role.to_string()),
                None => lines.push((line, when, why, vec![role.to_string()])),
            }
        }
    }
    let _ = write!(out, "<dt><code>{}</code></dt>", escape(&call.call));
    for (_, when, why, roles) in lines {
        let when = when.split_whitespace().collect::<Vec<_>>().join(" ");
        let _ = write!(
            out,
            "<dd><span class=\"dim\">{}</span> {} <em>{}</em></dd>",
            escape(&roles.join(", ")),
            if when.is_empty() {
                String::new()
            } else {
                format!("<code>{}</code>", escape(&when))
            },
            escape(&why)
        );
    }
}

#[cfg(test)]
pub(super) mod tests {
    use baton_ipc::Access;
    use baton_ipc::DescriptorKind;
    use baton_ipc::control::AuditCheck;
    use baton_ipc::control::AuditReport;
    use baton_ipc::control::AuditThread;
    use baton_ipc::control::Finding;
    use baton_ipc::control::Verdict;
    use serde_json::json;

    use super::*;

    /// An audit, with hostile texts where a worker can put them.
    pub(in crate::report) fn audited(proven: bool) -> Audited {
        let hostile = "<script>alert(1)</script>\u{1b}[31m\"'&";
        let descriptor = |fd, grant: &str, kind, target: &str| AuditDescriptor {
            fd,
            target: target.to_owned(),
            grant: grant.to_owned(),
            kind,
            access: Some(Access::ReadWrite),
            identity: (1, u64::from(fd)),
            seals: vec!["seal".to_owned()],
        };
        let mut descriptors = vec![
            descriptor(0, "control socket", None, "socket:[1]"),
            descriptor(3, "kvm#0", Some(DescriptorKind::Kvm), "/dev/kvm"),
            descriptor(4, "made by the worker: its VM", None, "anon_inode:kvm-vm"),
        ];
        let mut findings = Vec::new();
        if !proven {
            descriptors.push(descriptor(9, "unexplained", None, hostile));
            for rule in ["descriptor", "a-rule-of-tomorrow"] {
                findings.push(Finding {
                    rule: rule.to_owned(),
                    subject: "descriptor 9".to_owned(),
                    declared: "nothing".to_owned(),
                    found: hostile.to_owned(),
                });
            }
        }
        let check = |what: &str, evidence| AuditCheck {
            what: what.to_owned(),
            found: "as it should be".to_owned(),
            evidence,
        };
        let policy = Policy::builtin().unwrap();
        let report = AuditReport {
            verdict: if proven {
                Verdict::Proven
            } else {
                Verdict::Findings
            },
            worker_pid: 4242,
            generation: 3,
            worker_digest: "ab".repeat(32),
            policy: "default".to_owned(),
            policy_digest: policy.digest.to_string(),
            pause_us: 312,
            checks: vec![
                check("memory", Evidence::Kernel),
                check("limits", Evidence::Kernel),
                check("landlock", Evidence::ByConstruction),
            ],
            threads: vec![AuditThread {
                tid: 4242,
                role: "control".to_owned(),
                filters: 2,
                proof: "compared byte for byte".to_owned(),
            }],
            descriptors,
            findings,
            weaker: vec!["it is <weaker>".to_owned()],
        };
        let phases = [
            ("spawn", 20_000),
            ("build", 60_000),
            ("park", 90),
            ("save", 200),
            ("load", 210),
            ("run", 60),
        ];
        let phases: Vec<_> = phases
            .iter()
            .map(|(step, us)| json!({"step": step, "us": us}))
            .collect();
        Audited {
            vm: "web1".to_owned(),
            report,
            policy: Some(policy),
            upgrades: vec![json!({"time": 1_795_404_779_584_u64, "unmapped": {
                "outcome": "aborted", "generation": 3, "reason": hostile, "phases": phases,
            }})],
            time: 1_795_404_779_584,
        }
    }

    /// Every element is closed, and in the order in which it was opened.
    fn assert_well_formed(page: &str) {
        const VOID: [&str; 4] = ["meta", "!doctype", "br", "hr"];
        let mut open: Vec<&str> = Vec::new();
        let mut rest = page;
        while let Some(start) = rest.find('<') {
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            let name = tag
                .trim_start_matches('/')
                .split([' ', '\n'])
                .next()
                .unwrap();
            match tag {
                tag if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "at {start}"),
                tag if tag.ends_with('/') || VOID.contains(&name) => {}
                _ => open.push(name),
            }
            rest = &rest[end + 1..];
        }
        assert_eq!(open, [""; 0]);
    }

    #[test]
    fn a_page_holds_everything_itself_and_lets_nothing_hostile_in() {
        for all in [vec![audited(true)], vec![audited(false), audited(true)]] {
            let page = page(&all);
            assert_well_formed(&page);
            assert!(!page.contains("<script"), "a script");
            assert!(!page.contains('\u{1b}'), "a control character");
            for elsewhere in ["http://", "https://", "src=", "@import", "url(", "<link"] {
                assert!(
                    !page.contains(elsewhere),
                    "something from elsewhere: {elsewhere}"
                );
            }
            assert!(page.contains("prefers-color-scheme"));
        }
    }

    #[test]
    fn findings_come_first() {
        let page = page(&[audited(false)]);
        let place = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text}"));
        assert!(place("2 findings") < place("<h2>Findings"));
        assert!(place("<h2>Findings") < place("Who holds which"));
        assert!(place("Who holds which") < place("<h2>Upgrades"));
        assert!(place("<h2>Upgrades") < place("Roles and system calls"));
        assert!(page.contains("&lt;script&gt;"));
    }
}
