/*
 * Entry from the PVH loader (32-bit protected mode, flat, paging off, EBX =
 * hvm_start_info) to C in ring 3 with IOPL 3. Ring 0 is interpreted on hosts
 * without hardware virtualisation, so every table is laid out by the assembler
 * and only the switch itself runs in ring 0. The whole image is mapped user
 * and writable: there is nobody in here to protect.
 *
 * The tables need addresses split into bit fields, which the linker cannot
 * do, so this section sits at a fixed address (probe.ld) and its parts at
 * fixed offsets.
 */
#define IMAGE_BASE 0x200000
#define STUB_OFF   0x0800 /* 32 exception stubs, 16 bytes each */
#define IDT_OFF    0x0a00
#define PML4_OFF   0x1000
#define PDPT_OFF   0x2000
#define PD_OFF     0x3000 /* four pages: 4 GiB in 2 MiB steps */
#define TSS_OFF    0x7000 /* and the I/O bitmap, three pages */
#define TSS_LIMIT  (104 + 8192)

#define KCODE 0x08
#define KDATA 0x10
#define UDATA 0x1b
#define UCODE 0x23
#define TSSEL 0x28

#define PTE_TABLE 0x67 /* present, writable, user, accessed, dirty */
#define PTE_LARGE 0xe7

	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18 /* name size, desc size, XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.quad _start

	.section .head, "awx", @progbits
head:
	.code32
	.globl _start
_start:
	rdtsc
	movl %eax, boot_tsc
	movl %edx, boot_tsc + 4
	movl %ebx, start_info
	lgdt gdt_pointer
	movl $0x620, %eax /* CR4: PAE, OSFXSR, OSXMMEXCPT */
	movl %eax, %cr4
	movl $(IMAGE_BASE + PML4_OFF), %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx /* EFER.LME */
	movl $0x100, %eax
	xorl %edx, %edx
	wrmsr
	movl $0x80010033, %eax /* CR0: PG, WP, NE, ET, MP, PE */
	movl %eax, %cr0
	ljmp $KCODE, $long_mode

	.code64
long_mode:
	movl $KDATA, %eax
	movl %eax, %ss
	movl $kernel_stack_top, %esp
	lidt idt_pointer
	movl $TSSEL, %eax
	ltr %ax
	pushq $UDATA
	pushq $user_stack_top
	pushq $0x3002 /* IOPL 3, interrupts off */
	pushq $UCODE
	pushq $probe_main
	iretq

/* An exception saves what there is to know and goes on in ring 3. */
fault_common:
	pushq %rax
	movq %cr2, %rax
	movq %rax, fault_cr2
	popq %rax
	popq fault_vector
	popq fault_error
	popq fault_rip
	popq %rax /* cs */
	popq %rax /* rflags */
	popq fault_rsp
	movl $kernel_stack_top, %esp
	pushq $UDATA
	pushq $fault_stack_top
	pushq $0x3002
	pushq $UCODE
	pushq $fault_main
	iretq

	.balign 16
gdt:
	.quad 0
	.quad 0x00af9b000000ffff /* KCODE, 64-bit */
	.quad 0x00cf93000000ffff /* KDATA */
	.quad 0x00cff3000000ffff /* UDATA */
	.quad 0x00affb000000ffff /* UCODE, 64-bit */
	.quad 0x0000890000000000 | TSS_LIMIT | (((IMAGE_BASE + TSS_OFF) & 0xffffff) << 16)
	.quad 0
gdt_end:
gdt_pointer:
	.word gdt_end - gdt - 1
	.quad gdt
idt_pointer:
	.word 32 * 16 - 1
	.quad IMAGE_BASE + IDT_OFF

	.set vector, 0
	.rept 32
	.org STUB_OFF + vector * 16
	.if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21)
	pushq $0
	.endif
	pushq $vector
	jmp fault_common
	.set vector, vector + 1
	.endr

	.org IDT_OFF
	.globl idt
idt:
	.set vector, 0
	.rept 32
	.word (IMAGE_BASE + STUB_OFF + vector * 16) & 0xffff
	.word KCODE
	.word 0xee00
	.word (IMAGE_BASE + STUB_OFF + vector * 16) >> 16
	.quad 0
	.set vector, vector + 1
	.endr

	.org PML4_OFF
	.globl pml4
pml4:
	.quad IMAGE_BASE + PDPT_OFF + PTE_TABLE
	.org PDPT_OFF
	.globl pdpt
pdpt:
	.set gib, 0
	.rept 4
	.quad IMAGE_BASE + PD_OFF + gib * 0x1000 + PTE_TABLE
	.set gib, gib + 1
	.endr
	.org PD_OFF
	.set step, 0
	.rept 2048
	.quad step * 0x200000 + PTE_LARGE
	.set step, step + 1
	.endr

	/*
	 * IOPL 3 allows all ports, but some hosts lose it on the way (an IRETQ
	 * that is interpreted may drop it), so the bitmap allows them too.
	 */
	.org TSS_OFF
	.long 0
	.quad kernel_stack_top /* RSP0 */
	.org TSS_OFF + 102
	.word 104 /* where the bitmap starts */
	.org TSS_OFF + TSS_LIMIT
	.byte 0xff
	.balign 4096

	.section .bss
	.balign 16
	.skip 4096
kernel_stack_top:
	.skip 16384
fault_stack_top:
	.skip 65536
user_stack_top:

	.globl boot_tsc, start_info, fault_vector, fault_error, fault_rip, fault_rsp, fault_cr2
boot_tsc:	.skip 8
start_info:	.skip 8
fault_vector:	.skip 8
fault_error:	.skip 8
fault_rip:	.skip 8
fault_rsp:	.skip 8
fault_cr2:	.skip 8

	.section .note.GNU-stack, "", @progbits
