// Package hostinfo finds out what a host offers a virtual machine monitor:
// KVM and how it runs guests, userfaultfd, huge pages, networking, memory; and
// what is missing and what that costs.
package hostinfo
