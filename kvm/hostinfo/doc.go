// Package hostinfo finds out what a host offers a virtual machine monitor:
// KVM and how it runs guests, userfaultfd, huge pages, networking, memory.
package hostinfo
