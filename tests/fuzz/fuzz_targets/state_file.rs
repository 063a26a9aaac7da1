//! A guest's state file: prelude, header, state, RAM in extents, digest.
//!
//! What is promised: no panic; nothing is written outside of RAM; a file with another digest than its own is refused; one that
//! is taken gives, written anew, a file that gives the same guest. Input: the file without its digest, which is put there.
#![no_main]

use std::io;
use std::io::Cursor;

use baton_ipc::state_file;
use baton_ipc::state_file::Extent;
use baton_ipc::state_file::GRAIN;
use baton_ipc::state_file::Prelude;
use baton_ipc::state_file::Ram;
use baton_ipc::state_file::Reader;
use baton_ipc::state_file::Saved;
use baton_ipc::state_file::StateFileError;
use libfuzzer_sys::fuzz_target;

/// Bytes of a digest.
const DIGEST: usize = 32;

/// Two regions.
#[derive(PartialEq)]
struct Pages([Vec<u8>; 2]);

impl Pages {
    /// Blank; or, where RAM is to have stayed in place, with something in the first page.
    fn new(in_place: bool) -> Self {
        let mut pages = Self([vec![0; 0x4000], vec![0; 0x2000]]);
        pages.0[0][7] = u8::from(in_place) * 7;
        pages
    }
}

impl Ram for Pages {
    fn read(&self, region: u32, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let offset = offset as usize;
        to.copy_from_slice(&self.0[region as usize][offset..offset + to.len()]);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, from: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        self.0[region as usize][offset..offset + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn sizes(&self) -> Vec<u64> {
        self.0.iter().map(|region| region.len() as u64).collect()
    }

    fn extents(&self) -> io::Result<Vec<Extent>> {
        let regions = (0..).zip(&self.0);
        let extents = regions.flat_map(|(region, bytes)| {
            let pages = (0..).zip(bytes.chunks(GRAIN as usize));
            let written = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
            written.map(move |(page, _)| Extent {
                region,
                offset: page * GRAIN,
                length: GRAIN,
            })
        });
        Ok(extents.collect())
    }
}

/// What a file gives: its fixed part, and RAM. Leaves `file` behind its digest.
fn load(file: &mut Cursor<&[u8]>) -> Result<(Prelude, Pages), StateFileError> {
    let reader = Reader::open(file)?;
    let prelude = reader.prelude;
    let mut ram = Pages::new(prelude.in_place);
    reader.load(&mut ram)?;
    Ok((prelude, ram))
}

fuzz_target!(|data: &[u8]| {
    let mut file = [data, &[0; DIGEST]].concat();
    let mut cursor = Cursor::new(file.as_slice());
    let computed = match load(&mut cursor) {
        Err(StateFileError::Digest { computed, .. }) => computed,
        Err(error) => return assert!(!error.to_string().is_empty()),
        Ok((prelude, _)) => panic!("{prelude:?} with another digest"),
    };
    let end = cursor.position() as usize;
    file[end - DIGEST..end].copy_from_slice(&computed.0);

    let (prelude, ram) = load(&mut Cursor::new(&file)).unwrap();
    let Reader { header, state, .. } = Reader::open(file.as_slice()).unwrap();
    let saved = Saved {
        vm: prelude.vm,
        generation: prelude.generation,
        in_place: prelude.in_place,
        stands: prelude.stands,
        header: &header,
        state: &state,
    };
    let mut again = Vec::new();
    state_file::write(&mut again, &saved, &ram, &mut || false).unwrap();
    let (same, same_ram) = load(&mut Cursor::new(&again)).unwrap();
    // Its header's length may differ: a number has more than one encoding in postcard.
    assert_eq!((same.vm, same.generation), (prelude.vm, prelude.generation));
    assert_eq!((same.in_place, same.stands), (prelude.in_place, prelude.stands));
    assert!(same_ram == ram);
});
