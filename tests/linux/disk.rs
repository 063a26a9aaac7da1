//! Writes numbered, checksummed blocks on a disk past every cache, reads them back, and judges what is there afterwards.
//!
//! ```text
//! disk drive DEVICE        in the guest: goes on after the highest number that it finds, for ever
//! disk check FILE LEAST    on the host: LEAST is the least number that must have been written
//! ```
//!
//! Block N lies at place N modulo the number of places, so each place must hold the highest number that belongs there: an
//! older one was lost, a mixture is torn. One write is made after the other has ended and each eighth is flushed, so only
//! the one after the highest number may be there or not. What `drive` reads back wrong, it says in the last block, and
//! stops.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;

const BLOCK: usize = 4096;
const FLUSH_EACH: u64 = 8;
/// O_DIRECT (x86-64, asm-generic/fcntl.h), whose buffers are aligned to their blocks.
const O_DIRECT: i32 = 0o40000;
/// What the last block begins with once something was wrong.
const WRONG: u64 = u64::from_le_bytes(*b"WRONG!!!");

#[derive(Clone)]
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// A word of block `number`: no two words of any blocks are alike.
fn word(number: u64, index: u64) -> u64 {
    let mut mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.rotate_left(40);
    mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}

impl Block {
    fn of(number: u64) -> Self {
        let mut block = Self([0; BLOCK]);
        for (index, bytes) in (0..).zip(block.0.chunks_exact_mut(8)) {
            let value = if index == 0 {
                number
            } else {
                word(number, index)
            };
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        block
    }

    /// The number that it says it has.
    fn claims(&self) -> u64 {
        self.0
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Its number, 0 for a blank one; an error if it is torn.
    fn number(&self) -> Result<u64, u64> {
        let number = self.claims();
        if self.0 == Self::of(number).0 || self.0 == [0; BLOCK] {
            Ok(number)
        } else {
            Err(number)
        }
    }
}

fn places(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let bytes = (&*file).seek(SeekFrom::End(0))?;
    (bytes / BLOCK as u64)
        .checked_sub(1)
        .filter(|places| *places > 0)
        .ok_or_else(|| io::Error::other("the disk is too small"))
}

fn read(file: &File, place: u64) -> io::Result<Block> {
    let mut block = Block([0; BLOCK]);
    file.read_exact_at(&mut block.0, place * BLOCK as u64)?;
    Ok(block)
}

/// The highest number, and what is wrong with the places, if anything.
fn judge(file: &File) -> io::Result<(u64, Vec<String>)> {
    let places = places(file)?;
    let (mut found, mut wrong) = (Vec::new(), Vec::new());
    for place in 0..places {
        match read(file, place)?.number() {
            Ok(number) => found.push(number),
            Err(claimed) => {
                wrong.push(format!("place {place} is torn; it begins as {claimed}"));
                found.push(0);
            }
        }
    }
    let highest = found.iter().copied().max().unwrap_or(0);
    for (place, found) in (0..places).zip(found) {
        // The highest number up to `highest` that belongs here; 0 before the first.
        let back = (highest % places + places - place) % places;
        let expected = highest.saturating_sub(back);
        if found != expected && !(expected == 0 || back > highest) {
            wrong.push(format!("place {place} holds {found}, not {expected}"));
        }
    }
    let mark = read(file, places)?;
    if mark.claims() == WRONG {
        wrong.push(format!(
            "the guest read back something else than it wrote: {}",
            String::from_utf8_lossy(&mark.0[8..200]).trim_end_matches('\0')
        ));
    }
    Ok((highest, wrong))
}

fn drive(device: &str) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(device)?;
    let places = places(&file)?;
    let (highest, wrong) = judge(&file)?;
    if let Some(first) = wrong.first() {
        return stop(&file, places, first);
    }
    for number in highest + 1.. {
        file.write_all_at(&Block::of(number).0, number % places * BLOCK as u64)?;
        if number % FLUSH_EACH == 0 {
            file.sync_data()?;
        }
        // One of those that were written before.
        let earlier = number - word(number, 1) % places.min(number);
        if read(&file, earlier % places)?.number() != Ok(earlier) {
            return stop(&file, places, &format!("block {earlier} after {number}"));
        }
    }
    Ok(())
}

fn stop(file: &File, mark: u64, what: &str) -> io::Result<()> {
    let mut block = Block([0; BLOCK]);
    let text = [&WRONG.to_le_bytes()[..], what.as_bytes()].concat();
    for (to, from) in block.0.iter_mut().zip(text) {
        *to = from;
    }
    file.write_all_at(&block.0, mark * BLOCK as u64)?;
    file.sync_data()?;
    Err(io::Error::other(what.to_owned()))
}

fn check(path: &str, least: u64) -> io::Result<String> {
    let (highest, wrong) = judge(&File::open(path)?)?;
    if let Some(first) = wrong.first() {
        return Err(io::Error::other(format!(
            "{first}; {} faults in all, the highest number is {highest}",
            wrong.len()
        )));
    }
    if highest < least {
        return Err(io::Error::other(format!(
            "only {highest} blocks were written, not {least}"
        )));
    }
    Ok(format!("ok: {highest} blocks, none lost, none torn"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["drive", device] => drive(device).map(|()| String::new()),
        ["check", path, least] => match least.parse() {
            Ok(least) => check(path, least),
            Err(e) => Err(io::Error::other(format!("{least}: {e}"))),
        },
        _ => Err(io::Error::other(
            "usage: disk drive DEVICE | disk check FILE LEAST",
        )),
    };
    match outcome {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, numbers: impl Iterator<Item = u64>) -> String {
        let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.set_len(9 * BLOCK as u64).unwrap();
        for number in numbers {
            file.write_all_at(&Block::of(number).0, number % 8 * BLOCK as u64)
                .unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn what_was_written_in_order_is_well() {
        for last in [0, 1, 5, 8, 20] {
            let path = image("good", 1..=last);
            check(&path, last).unwrap();
            assert!(check(&path, last + 1).is_err());
        }
    }

    #[test]
    fn a_lost_a_torn_and_a_marked_block_are_found() {
        let lost = image("lost", (1..=20).filter(|number| *number != 15));
        assert!(
            check(&lost, 1)
                .unwrap_err()
                .to_string()
                .contains("holds 7, not 15")
        );
        let torn = image("torn", 1..=20);
        let file = OpenOptions::new().write(true).open(&torn).unwrap();
        file.write_all_at(&[1], 3 * BLOCK as u64 + 2048).unwrap();
        assert!(check(&torn, 1).unwrap_err().to_string().contains("torn"));
        let marked = image("marked", 1..=20);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&marked)
            .unwrap();
        stop(&file, 8, "block 3").unwrap_err();
        assert!(
            check(&marked, 1)
                .unwrap_err()
                .to_string()
                .contains("block 3")
        );
    }
}
