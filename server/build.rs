//! Tells cargo that the embedded catalog migrations are an input of this crate.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
