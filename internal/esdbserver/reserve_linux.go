package esdbserver

import (
	"net"
	"os"
	"syscall"
)

// reserve keeps the address of a listener for the server while it is down: a
// socket that is bound and does not listen refuses connections, and keeps others,
// also those who connect from a port that the system chooses, from taking the
// port. It returns nil where that cannot be done.
func reserve(address net.Addr) *os.File {
	tcp, ok := address.(*net.TCPAddr)
	if !ok || tcp.IP.To4() == nil {
		return nil
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	at := &syscall.SockaddrInet4{Port: tcp.Port, Addr: [4]byte(tcp.IP.To4())}
	if syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) != nil || syscall.Bind(fd, at) != nil {
		_ = syscall.Close(fd)
		return nil
	}
	return os.NewFile(uintptr(fd), "reserved port")
}
