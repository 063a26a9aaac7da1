//! Who holds which descriptor, drawn: the broker on one side, the worker on the other, what they hold between them.

use std::fmt::Write;

use baton_ipc::Access;
use baton_ipc::control::AuditDescriptor;

use super::Audited;
use super::html::escape;

/// What one row of the drawing stands for.
struct Object {
    name: String,
    detail: String,
    access: Option<Access>,
    kind: Group,
    count: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    /// Handed out by the broker, who holds it, too.
    Granted,
    /// A connection between the two.
    Channel,
    /// Made by the worker for itself.
    Own,
    /// Nobody knows why.
    Unexplained,
}

impl Group {
    fn class(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Channel => "channel",
            Self::Own => "own",
            Self::Unexplained => "unexplained",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Granted => "granted by the broker",
            Self::Channel => "between the two",
            Self::Own => "made by the worker",
            Self::Unexplained => "unexplained",
        }
    }
}

fn objects(descriptors: &[AuditDescriptor]) -> Vec<Object> {
    let mut objects: Vec<Object> = Vec::new();
    for descriptor in descriptors {
        let kind = match descriptor.grant.as_str() {
            "unexplained" => Group::Unexplained,
            "control socket" | "diagnostics" => Group::Channel,
            own if own.starts_with("made by the worker") => Group::Own,
            _ => Group::Granted,
        };
        let name = descriptor
            .grant
            .strip_prefix("made by the worker: ")
            .unwrap_or(&descriptor.grant);
        let name = if kind == Group::Unexplained {
            &descriptor.target
        } else {
            name
        };
        let detail = match kind {
            Group::Granted => crate::report::word(&descriptor.kind),
            _ => String::new(),
        };
        let same = objects
            .iter_mut()
            .find(|object| object.kind == kind && object.name == name);
        match same {
            Some(object) => object.count += 1,
            None => objects.push(Object {
                name: name.to_owned(),
                detail,
                access: descriptor.access,
                kind,
                count: 1,
            }),
        }
    }
    objects.sort_by_key(|object| object.kind);
    objects
}

/// Pixels, of the drawing for wide and the one for narrow pages.
struct Measures {
    width: u32,
    party: u32,
    object: u32,
    class: &'static str,
}

const WIDE: Measures = Measures {
    width: 960,
    party: 150,
    object: 400,
    class: "wide",
};
const NARROW: Measures = Measures {
    width: 350,
    party: 58,
    object: 176,
    class: "narrow",
};

const ROW: u32 = 34;
const TITLE: u32 = 30;

/// The drawing twice, of which the page shows the one that fits.
pub(super) fn figure(audited: &Audited) -> String {
    let objects = objects(&audited.report.descriptors);
    let mut out = String::from("<figure>");
    for measures in [WIDE, NARROW] {
        draw(&mut out, audited, &objects, &measures);
    }
    out.push_str(
        "<figcaption><span><i class=\"line rw\"></i>read and write</span><span><i class=\"line ro\"></i>read only</span>\
         <span><i class=\"line wo\"></i>write only</span></figcaption></figure>",
    );
    out
}

fn draw(out: &mut String, audited: &Audited, objects: &[Object], m: &Measures) {
    let mut y = 8;
    let mut rows = Vec::new();
    let mut last = None;
    for object in objects {
        if last != Some(object.kind) {
            y += if last.is_some() { 14 } else { 0 };
            rows.push((y, None, object.kind));
            y += TITLE;
            last = Some(object.kind);
        }
        rows.push((y, Some(object), object.kind));
        y += ROW;
    }
    let height = y.max(ROW * 3) + 8;
    let _ = write!(
        out,
        "<svg class=\"{}\" viewBox=\"0 0 {} {height}\" role=\"img\" aria-label=\"Which descriptors the broker and the worker of {} hold; the table below says the same\">",
        m.class,
        m.width,
        escape(&audited.vm)
    );
    let left = (m.width - m.object) / 2;
    let right = left + m.object;
    let middle = height / 2;
    // Lines first, so that boxes lie on top of them.
    for (y, object, kind) in &rows {
        let Some(object) = object else { continue };
        let at = y + (ROW - 6) / 2;
        let class = match object.access {
            Some(Access::Read) => "ro",
            Some(Access::Write) => "wo",
            _ => "rw",
        };
        let mut curve = |from: u32, to: u32| {
            let half = from.midpoint(to);
            let _ = write!(
                out,
                "<path class=\"{class} {}\" d=\"M{from} {middle}C{half} {middle} {half} {at} {to} {at}\"/>",
                kind.class()
            );
        };
        if matches!(kind, Group::Granted | Group::Channel) {
            curve(m.party, left);
        }
        curve(m.width - m.party, right);
    }
    party(out, m, 1, middle, "broker", "opens and hands over");
    let generation = format!("generation {}", audited.report.generation);
    party(out, m, m.width - m.party - 1, middle, "worker", &generation);
    for (y, object, kind) in &rows {
        let Some(object) = object else {
            let _ = write!(
                out,
                "<text class=\"group\" x=\"{left}\" y=\"{}\">{}</text>",
                y + 19,
                kind.title()
            );
            continue;
        };
        let _ = write!(
            out,
            "<rect class=\"object {}\" x=\"{left}\" y=\"{y}\" width=\"{}\" height=\"{}\" rx=\"6\"/>",
            kind.class(),
            m.object,
            ROW - 6
        );
        let text = y + 18;
        let most = if m.class == "wide" { 44 } else { 22 };
        let mut name: String = object.name.chars().take(most).collect();
        if object.count > 1 {
            let _ = write!(name, " ×{}", object.count);
        }
        let _ = write!(
            out,
            "<text x=\"{}\" y=\"{text}\">{}</text>",
            left + 12,
            escape(&name)
        );
        if m.class == "wide" && !object.detail.is_empty() {
            let _ = write!(
                out,
                "<text class=\"detail\" x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>",
                right - 12,
                escape(&object.detail)
            );
        }
    }
    out.push_str("</svg>");
}

fn party(out: &mut String, m: &Measures, x: u32, middle: u32, name: &str, detail: &str) {
    let centre = x + m.party / 2;
    let _ = write!(
        out,
        "<rect class=\"party\" x=\"{x}\" y=\"{}\" width=\"{}\" height=\"60\" rx=\"8\"/><text class=\"party\" x=\"{centre}\" y=\"{}\" text-anchor=\"middle\">{name}</text>",
        middle - 30,
        m.party,
        if m.class == "wide" {
            middle - 2
        } else {
            middle + 4
        },
    );
    if m.class == "wide" {
        let _ = write!(
            out,
            "<text class=\"detail\" x=\"{centre}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            middle + 17,
            escape(detail)
        );
    }
}
