//! Huge pages of the host, set aside for a test.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// How many pages of 2 MiB are set aside (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// So many pages more than there were, and a hugetlbfs of them; dropped, both are gone.
#[derive(Debug)]
pub struct HugePages {
    before: u32,
    directory: TempDir,
}

impl HugePages {
    /// Sets them aside.
    ///
    /// # Panics
    ///
    /// If the host cannot.
    #[must_use]
    pub fn set_aside(more: u32) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("baton-e2e-")
            .tempdir_in("/dev/shm")
            .expect("a directory where policy has guest RAM");
        let pages = Self {
            before: number(),
            directory,
        };
        let wanted = pages.before + more;
        std::fs::write(NUMBER, wanted.to_string()).expect("root sets huge pages aside");
        assert_eq!(number(), wanted, "the host has no such pages to set aside");
        let mounted = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M,mode=0700", "none"])
            .arg(pages.directory.path())
            .status();
        assert!(
            mounted.is_ok_and(|status| status.success()),
            "cannot mount hugetlbfs"
        );
        pages
    }

    /// Where files of them can be made.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.directory.path()).status();
        let _ = std::fs::write(NUMBER, self.before.to_string());
    }
}

fn number() -> u32 {
    let text = std::fs::read_to_string(NUMBER).expect("the kernel has pages of 2 MiB");
    text.trim().parse().expect("a number")
}
