//! From the VMM's first instruction to Rust at CPL3.
//!
//! The boot vCPU arrives as the 64-bit Linux boot protocol says (Documentation/arch/x86/boot.rst, "64-bit boot
//! protocol"): long mode, CPL0, identity-mapped, RSI at the zero page. It loads tables of this image, reads the CPUID
//! leaves that say how fast the TSC runs, and leaves for CPL3, for good: under kvm-pvm every instruction at CPL0 is
//! emulated. The other vCPUs arrive in real mode, by the start-up IPI, on a copy of `trampoline`.
//!
//! At CPL3 the program may use ports because the TSS has an I/O permission bitmap that permits all of them: IOPL is not
//! enough, as kvm-pvm drops it on the way to CPL3. It cannot change RFLAGS.IF there either, so interrupts are enabled
//! from the start, and none comes before `interrupts` asks for it.

use core::arch::global_asm;

use crate::interrupts::{AREA_SIZE, AREAS, IDT_LIMIT};
use crate::layout::{BARE_ZERO_PAGE, MAX_VCPUS, TRAMPOLINE_ADDRESS};

global_asm!(
    r#"
    // From real or 32-bit mode, by the page tables of this image; a far jump to the 64-bit code segment has to follow.
    .macro to_long_mode
    mov eax, 0x620                  // as at `_start`
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             // EFER
    mov eax, 0x100                  // LME
    xor edx, edx
    wrmsr
    mov eax, 0x80010033             // as at `enter_cpl3`
    mov cr0, eax
    .endm

    .section .text.entry, "ax"
    // Without firmware: 32-bit protected mode, flat. As `trampoline`, and then as a boot loader would.
    .code32
bare:
    cli
    to_long_mode
    lgdt [gdt_pointer]
    .byte 0xea                      // far jump to the 64-bit code segment
    .long bare_long
    .word 0x10
    .code64
bare_long:
    mov eax, 0x18
    mov ss, eax
    mov esi, {bare_zero_page}
    jmp _start

    .code64
    .globl _start
_start:
    cli
    xor edi, edi
    // CR4 first: with SMEP left on, CPL0 could not run from the user pages below.
    mov eax, 0x620                  // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, rax
    lea rax, [rip + pml4]
    mov cr3, rax
    lea rbp, [rip + timing_leaves]
    mov eax, 0x40000000
    cpuid
    mov [rbp], eax
    mov eax, 0x40000010
    cpuid
    mov [rbp + 4], eax
    xor eax, eax
    cpuid
    mov [rbp + 8], eax
    mov eax, 0x15
    xor ecx, ecx
    cpuid
    mov [rbp + 12], eax
    mov [rbp + 16], ebx
    mov [rbp + 20], ecx

    // Every vCPU: its number in EDI, long mode, the page tables of this image.
enter_cpl3:
    mov eax, 0x80010033             // PG, WP, NE, ET, MP, PE; EM and TS clear, so that SSE works
    mov cr0, rax
    lgdt [rip + gdt_pointer]
    lidt [rip + idt_pointer]
    // One TSS descriptor a vCPU. Its busy bit may be left over from before a reset.
    lea rax, [rip + gdt_tss]
    mov ecx, edi
    shl ecx, 4
    mov byte ptr [rax + rcx + 5], 0x89
    add ecx, 0x30
    ltr cx
    // No interrupt from the 8259s: they are wired to the first vCPU's LINT0, open after a reset.
    mov ecx, 0xfee00350
    mov dword ptr [rcx], 0x10000
    // The stack grows down from the end of the vCPU's area.
    lea eax, [rdi + 1]
    imul eax, eax, {area_size}
    add eax, {areas}
    mov rsp, rax
    push 0x23                       // SS: user data
    push rax
    push 0x3202                     // IOPL 3, where it is honoured; interrupts
    push 0x2b                       // CS: user code
    lea rax, [rip + user]
    push rax
    iretq

user:
    cld
    mov eax, 0x23
    mov ds, eax
    mov es, eax
    test edi, edi
    jnz 2f
    // Loaders copy what the file holds; blank the rest here, where it is fast.
    mov r12, rsi
    lea rdi, [rip + bss_start]
    lea rcx, [rip + bss_end]
    sub rcx, rdi
    xor eax, eax
    rep stosb
    mov rdi, r12
    call {boot_main}
2:  call {other_main}
3:  ud2

    // Copied to a page below 1 MiB: the start-up IPI begins there in real mode, with CS at the page.
    .balign 16
    .globl trampoline
trampoline:
    .code16
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x0f, 0x01, 0x16          // lgdt [disp16]: loads 24 bits of the base, which is enough
    .word trampoline_gdt_pointer - trampoline
    to_long_mode
    .byte 0x66, 0xea                // far jump to the 64-bit code segment
    .long {trampoline_address} + trampoline_long - trampoline
    .word 0x10
    .code64
trampoline_long:
    mov eax, 0x18
    mov ss, eax
    mov eax, offset starting_vcpu
    mov edi, [rax]
    mov eax, offset enter_cpl3
    jmp rax
    .balign 8
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .globl trampoline_end
trampoline_end:

    .section .data.tables, "aw"
    .balign 4096
    // Flat, user-accessible and writable, 2 MiB pages: the low 4 GiB. `paging` adds what lies above.
    .globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad low_directories + 7, low_directories + 0x1007, low_directories + 0x2007, low_directories + 0x3007
    .fill 508, 8, 0
low_directories:
    .set page, 0
    .rept 2048
    .quad (page << 21) | 0x87
    .set page, page + 1
    .endr

    .balign 16
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff        // 0x10: 64-bit code
    .quad 0x00cf93000000ffff        // 0x18: data
    .quad 0x00cff3000000ffff        // 0x20: user data
    .quad 0x00affb000000ffff        // 0x28: user 64-bit code
gdt_tss:                            // 0x30: a TSS at the start of each vCPU's area; with its bitmap 0x2069 bytes long
    .set area, {areas}
    .rept {vcpus}
    .word 0x2068, area & 0xffff
    .byte (area >> 16) & 0xff, 0x89, 0, (area >> 24) & 0xff
    .quad 0
    .set area, area + {area_size}
    .endr
gdt_end:
    .balign 8
    .word 0, 0, 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .word 0, 0, 0
idt_pointer:
    .word {idt_limit}
    .quad {idt}

    .balign 8
    .globl timing_leaves
timing_leaves:
    .fill 6, 4, 0
    .globl starting_vcpu
starting_vcpu:
    .quad 0
    "#,
    areas = const AREAS,
    area_size = const AREA_SIZE,
    idt = sym crate::interrupts::IDT,
    idt_limit = const IDT_LIMIT,
    bare_zero_page = const BARE_ZERO_PAGE,
    vcpus = const MAX_VCPUS,
    trampoline_address = const TRAMPOLINE_ADDRESS,
    boot_main = sym crate::boot_main,
    other_main = sym crate::other_main,
);
