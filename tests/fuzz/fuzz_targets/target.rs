//! All targets in one program, so that it is linked once: the one that `STRAND_FUZZ_TARGET` names is run.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use strandline_tests::fuzz::{Target, memory, target};

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    memory::measure_with(|work| allocation_counter::measure(work).bytes_max);
    let name = std::env::var("STRAND_FUZZ_TARGET").unwrap_or_default();
    target(&name).unwrap_or_else(|| panic!("STRAND_FUZZ_TARGET={name} is no target"))
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));
