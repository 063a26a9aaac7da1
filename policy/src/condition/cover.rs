//! Which calls do conditions have in common, and which has one that others have not?
//!
//! A conjunction of masked comparisons fixes some bits of the arguments and leaves the others free. Taking one such
//! set away from another leaves a few of the same kind, so all answers here are exact.

use super::{Comparison, Conjunction};

/// The most pieces that a difference may fall into before it is given up as not covered.
const MAX_PIECES: usize = 4096;

/// Whether some call meets both. Exact.
#[must_use]
pub fn intersect(one: &[Comparison], other: &[Comparison]) -> bool {
    one.iter().all(|a| {
        other.iter().filter(|b| b.index == a.index).all(|b| {
            let both = a.mask & b.mask;
            a.value & both == b.value & both
        })
    })
}

/// Whether every call that meets `narrow` meets `wide` too. Exact.
#[must_use]
pub fn implies(narrow: &[Comparison], wide: &[Comparison]) -> bool {
    wide.iter().all(|asked| {
        narrow.iter().any(|fixed| {
            fixed.index == asked.index
                && asked.mask & !fixed.mask == 0
                && fixed.value & asked.mask == asked.value
        })
    })
}

/// What meets `of` and none of `by`, as disjoint conjunctions. `None` when those would be more than 4096.
#[must_use]
pub fn difference(of: &[Comparison], by: &[Conjunction]) -> Option<Vec<Conjunction>> {
    let mut pieces = vec![of.to_vec()];
    for taken in by {
        let mut left = Vec::new();
        for piece in pieces {
            subtract(piece, taken, &mut left);
            if left.len() > MAX_PIECES {
                return None;
            }
        }
        pieces = left;
    }
    Some(pieces)
}

/// Whether every call that meets `of` meets one of `by`. Exact, but for a difference too ragged to work out, which
/// counts as not covered.
#[must_use]
pub fn covered(of: &[Comparison], by: &[Conjunction]) -> bool {
    difference(of, by).is_some_and(|pieces| pieces.is_empty())
}

/// Adds to `left` what is in `piece` and not in `taken`.
fn subtract(piece: Conjunction, taken: &[Comparison], left: &mut Vec<Conjunction>) {
    if !intersect(&piece, taken) {
        left.push(piece);
        return;
    }
    // Bit by bit that `taken` fixes and `piece` leaves free: what differs in this bit is outside, what does not is
    // looked at further.
    let mut inside = piece;
    for asked in taken {
        let fixed = inside
            .iter()
            .find(|one| one.index == asked.index)
            .map_or(0, |one| one.mask);
        let mut free = asked.mask & !fixed;
        while free != 0 {
            let bit = free & free.wrapping_neg();
            free &= !bit;
            let mut outside = inside.clone();
            fix(&mut outside, asked, bit, !asked.value & bit);
            left.push(outside);
            fix(&mut inside, asked, bit, asked.value & bit);
        }
    }
}

/// Fixes one bit of the argument that `like` is about.
fn fix(conjunction: &mut Conjunction, like: &Comparison, bit: u64, value: u64) {
    match conjunction.iter_mut().find(|one| one.index == like.index) {
        Some(one) => {
            one.mask |= bit;
            one.value |= value;
        }
        None => {
            conjunction.push(Comparison {
                mask: bit,
                value,
                ..*like
            });
            conjunction.sort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syscalls::Width;
    use proptest::prelude::*;

    /// Comparisons of four bits of two arguments, so that every call can be tried.
    fn conjunction() -> impl Strategy<Value = Conjunction> {
        prop::collection::btree_map(0_u8..2, (1_u64..16, 0_u64..16), 0..=2).prop_map(|all| {
            all.into_iter()
                .map(|(index, (mask, value))| Comparison {
                    index,
                    width: Width::Dword,
                    mask,
                    value: value & mask,
                })
                .collect()
        })
    }

    fn meets(conjunction: &[Comparison], arguments: [u64; 6]) -> bool {
        conjunction.iter().all(|one| one.holds(&arguments))
    }

    fn calls() -> impl Iterator<Item = [u64; 6]> {
        (0..16).flat_map(|a| (0..16).map(move |b| [a, b, 0, 0, 0, 0]))
    }

    proptest! {
        #[test]
        fn every_answer_is_what_trying_all_calls_says(
            of in conjunction(), by in prop::collection::vec(conjunction(), 0..4),
        ) {
            let pieces = difference(&of, &by).unwrap();
            for call in calls() {
                let expected = meets(&of, call) && !by.iter().any(|one| meets(one, call));
                let found = pieces.iter().filter(|piece| meets(piece, call)).count();
                prop_assert_eq!(found, usize::from(expected), "{:?}", call);
            }
            prop_assert_eq!(covered(&of, &by), calls().all(|call| !meets(&of, call) || by.iter().any(|one| meets(one, call))));
            for one in &by {
                prop_assert_eq!(intersect(&of, one), calls().any(|call| meets(&of, call) && meets(one, call)));
                prop_assert_eq!(implies(&of, one), calls().all(|call| !meets(&of, call) || meets(one, call)));
            }
        }
    }
}
