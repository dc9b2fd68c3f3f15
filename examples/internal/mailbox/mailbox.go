// Package mailbox is a small SMTP server for the examples, which keeps what it
// gets as files in a folder. It may import nothing of deed.
package mailbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/mail"
	"os"
	"path/filepath"
	"strings"

	"github.com/emersion/go-smtp"
)

// Mailbox takes every mail and keeps it as a file in a folder, named by its
// Message-ID, so that one sent twice is there once.
type Mailbox struct {
	// Port is where it serves, on the loopback interface.
	Port     int
	server   *smtp.Server
	listener net.Listener
	served   chan error
}

// Start serves on a free port of the loopback interface until Close. It makes
// the folder, and tells out what has come.
func Start(folder string, out io.Writer) (*Mailbox, error) {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return Serve(listener, folder, out), nil
}

// Serve serves on the listener until Close. The folder must be there.
func Serve(listener net.Listener, folder string, out io.Writer) *Mailbox {
	server := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
		return &session{folder: folder, out: out}, nil
	}))
	server.Domain = "localhost"
	s := &Mailbox{Port: listener.Addr().(*net.TCPAddr).Port, server: server, listener: listener, served: make(chan error, 1)}
	go func() { s.served <- server.Serve(listener) }()
	return s
}

// Close stops the server.
func (s *Mailbox) Close() error {
	err := s.server.Close()
	// The server may not have heard of its listener yet.
	if closing := s.listener.Close(); !errors.Is(closing, net.ErrClosed) {
		err = errors.Join(err, closing)
	}
	if served := <-s.served; !errors.Is(served, smtp.ErrServerClosed) && !errors.Is(served, net.ErrClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// session is one connection of a client.
type session struct {
	folder string
	out    io.Writer
	to     []string
}

func (s *session) Mail(string, *smtp.MailOptions) error { return nil }

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.to = append(s.to, to)
	return nil
}

// Data keeps the mail; when it returns nil, the client may forget it.
func (s *session) Data(r io.Reader) error {
	data, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	message, err := mail.ReadMessage(bytes.NewReader(data))
	if err != nil {
		return err
	}
	id := message.Header.Get("Message-ID")
	if id == "" {
		return errors.New("the mail has no Message-ID, by which it is kept")
	}
	path := filepath.Join(s.folder, fileName(id))
	if _, err := os.Stat(path); err == nil {
		fmt.Fprintf(s.out, "mailbox: the mail %s is here already\n", id)
		return nil
	}
	// Under its name it is whole, whenever the process dies.
	file, err := os.CreateTemp(s.folder, "arriving-*")
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "mailbox: got %q for %s, %s\n", message.Header.Get("Subject"), s.to, id)
	return nil
}

// fileName keeps of a Message-ID what every file system takes.
func fileName(id string) string {
	return strings.Map(func(c rune) rune {
		if strings.ContainsRune("<>:\"/\\|?* ", c) {
			return '_'
		}
		return c
	}, strings.Trim(id, "<>")) + ".eml"
}

func (s *session) Reset()        { s.to = nil }
func (s *session) Logout() error { return nil }
