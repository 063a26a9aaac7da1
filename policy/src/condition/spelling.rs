//! Which name was meant.

/// The candidate that needs the fewest edits to become `name`, when they are few.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let limit = name.len().min(80) / 3 + 1;
    let name = name.to_ascii_lowercase();
    candidates
        .map(|candidate| (edits(&name, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance. Names are short, except hostile ones, which are cut.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<u8> = to.bytes().take(80).collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().take(80).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (above, b) in row.iter().skip(1).zip(&to) {
            left = (diagonal + usize::from(a != *b))
                .min(left + 1)
                .min(above + 1);
            next.push(left);
            diagonal = *above;
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}
