//! The main channel: the state stream and the frames before the pause.
//!
//! What is promised: no panic; in whatever pieces the bytes come, the outcome is the same; a stream that is taken encodes to
//! the same bytes again. Input: the bytes; the last one says in which pieces they come.
#![no_main]

use baton_ipc::VmId;
use baton_ipc::state_stream::Answer;
use baton_ipc::state_stream::Decoder;
use baton_ipc::state_stream::Encoder;
use baton_ipc::state_stream::Frame;
use baton_ipc::state_stream::Offer;
use libfuzzer_sys::fuzz_target;

const VM: VmId = VmId([0x42; 16]);
const GENERATION: u32 = 2;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, bytes)) = data.split_last() else {
        return;
    };
    let piece = usize::from(piece) + 1;
    let whole = Decoder::new(VM, GENERATION).push(bytes);
    let mut decoder = Decoder::new(VM, GENERATION);
    let mut pieces = Ok(None);
    for chunk in bytes.chunks(piece) {
        pieces = decoder.push(chunk);
        if !matches!(pieces, Ok(None)) {
            break;
        }
    }
    match (whole, pieces) {
        (Ok(Some(stream)), Ok(Some(same))) => {
            assert_eq!(stream.digest, same.digest);
            let mut encoder = Encoder::new(VM, GENERATION);
            for section in &stream.sections {
                encoder.section(section).unwrap();
            }
            let (again, digest) = encoder.finish();
            assert_eq!(again, bytes);
            assert_eq!(digest, stream.digest);
        }
        // What follows the end record is seen only if it comes with it; the next push refuses it.
        (Err(_), Ok(Some(_)) | Err(_)) | (Ok(None), Ok(None)) => {}
        (whole, pieces) => panic!("{whole:?} whole, {pieces:?} in pieces of {piece}"),
    }
    frames::<Offer>(bytes);
    frames::<Answer>(bytes);
});

/// What decodes as a frame decodes to the same value again.
fn frames<M: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(
    bytes: &[u8],
) {
    if let Ok(Some(value)) = Frame::default().push::<M>(bytes) {
        let again = Frame::encode(&value).unwrap();
        let same = Frame::default().push::<M>(&again).unwrap();
        assert_eq!(same, Some(value));
    }
}
