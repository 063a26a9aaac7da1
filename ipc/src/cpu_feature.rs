//! CPUID features that a VM file can hide from its guest, by the names of Linux's `/proc/cpuinfo`.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use thiserror::Error;

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// One feature: a bit of a register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFeature {
    name: &'static str,
    leaf: u32,
    register: CpuidRegister,
    bit: u8,
}

/// A name that is no known feature.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{given:?} is no CPU feature that can be hidden; known are: {}",
    known()
)]
pub struct UnknownFeature {
    given: String,
}

use CpuidRegister::Ebx;
use CpuidRegister::Ecx;
use CpuidRegister::Edx;

/// Source: Intel SDM volume 2A, CPUID (leaves 1 and 7); AMD APM volume 3, appendix E (0x80000001).
const FEATURES: &[(&str, u32, CpuidRegister, u8)] = &[
    ("pni", 1, Ecx, 0),
    ("sse3", 1, Ecx, 0),
    ("pclmulqdq", 1, Ecx, 1),
    ("ssse3", 1, Ecx, 9),
    ("fma", 1, Ecx, 12),
    ("cx16", 1, Ecx, 13),
    ("pcid", 1, Ecx, 17),
    ("sse4_1", 1, Ecx, 19),
    ("sse4_2", 1, Ecx, 20),
    ("x2apic", 1, Ecx, 21),
    ("movbe", 1, Ecx, 22),
    ("popcnt", 1, Ecx, 23),
    ("tsc_deadline_timer", 1, Ecx, 24),
    ("aes", 1, Ecx, 25),
    ("xsave", 1, Ecx, 26),
    ("osxsave", 1, Ecx, 27),
    ("avx", 1, Ecx, 28),
    ("f16c", 1, Ecx, 29),
    ("rdrand", 1, Ecx, 30),
    ("fsgsbase", 7, Ebx, 0),
    ("bmi1", 7, Ebx, 3),
    ("avx2", 7, Ebx, 5),
    ("smep", 7, Ebx, 7),
    ("bmi2", 7, Ebx, 8),
    ("erms", 7, Ebx, 9),
    ("invpcid", 7, Ebx, 10),
    ("avx512f", 7, Ebx, 16),
    ("rdseed", 7, Ebx, 18),
    ("adx", 7, Ebx, 19),
    ("smap", 7, Ebx, 20),
    ("clflushopt", 7, Ebx, 23),
    ("clwb", 7, Ebx, 24),
    ("sha_ni", 7, Ebx, 29),
    ("umip", 7, Ecx, 2),
    ("pku", 7, Ecx, 3),
    ("la57", 7, Ecx, 16),
    ("fsrm", 7, Edx, 4),
    ("svm", 0x8000_0001, Ecx, 2),
    ("pdpe1gb", 0x8000_0001, Edx, 26),
    ("rdtscp", 0x8000_0001, Edx, 27),
];

fn known() -> String {
    let names: Vec<_> = FEATURES.iter().map(|feature| feature.0).collect();
    names.join(", ")
}

impl CpuFeature {
    /// CPUID's EAX.
    #[must_use]
    pub fn leaf(self) -> u32 {
        self.leaf
    }

    /// The register that has the bit; subleaf 0 in all of them.
    #[must_use]
    pub fn register(self) -> CpuidRegister {
        self.register
    }

    /// The bit's mask.
    #[must_use]
    pub fn mask(self) -> u32 {
        1 << self.bit
    }
}

impl FromStr for CpuFeature {
    type Err = UnknownFeature;

    fn from_str(given: &str) -> Result<Self, UnknownFeature> {
        FEATURES
            .iter()
            .find(|feature| feature.0 == given)
            .map(|&(name, leaf, register, bit)| Self {
                name,
                leaf,
                register,
                bit,
            })
            .ok_or_else(|| UnknownFeature {
                given: given.chars().take(32).collect(),
            })
    }
}

impl fmt::Display for CpuFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

// By hand: deriving it would tie the static name to the message's lifetime.
impl Serialize for CpuFeature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for CpuFeature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_feature_names_the_known_ones() {
        let error = "quantum".parse::<CpuFeature>().unwrap_err().to_string();
        assert!(
            error.contains("quantum") && error.contains("cx16"),
            "{error}"
        );
    }

    #[test]
    fn a_feature_crosses_the_wire_by_name() {
        let cx16: CpuFeature = "cx16".parse().unwrap();
        assert_eq!(
            (cx16.leaf(), cx16.register(), cx16.mask()),
            (1, Ecx, 0x2000)
        );
        let bytes = postcard::to_stdvec(&cx16).unwrap();
        assert_eq!(postcard::from_bytes::<CpuFeature>(&bytes).unwrap(), cx16);
    }
}
