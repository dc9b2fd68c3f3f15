package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/mail"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/deed-go/deed"
	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/eventstore/sqlite"
	"github.com/deed-go/deed/examples/internal/mailbox"
	"github.com/deed-go/deed/internal/esdbserver"
)

// TestMain lets the test binary be the program itself, so that it can die.
func TestMain(m *testing.M) {
	if os.Getenv("MAIL_PROGRAM") != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// start runs the program in a process of its own.
func start(t *testing.T, args ...string) (string, error) {
	t.Helper()
	binary, err := os.Executable()
	require.NoError(t, err)
	child := exec.CommandContext(t.Context(), binary, args...)
	child.Env = append(os.Environ(), "MAIL_PROGRAM=1")
	var stderr bytes.Buffer
	child.Stderr = &stderr
	stdout, err := child.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(stdout), err
}

// mails returns what is in the mailbox.
func mails(t *testing.T, dir string) []*mail.Message {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "mailbox", "*.eml"))
	require.NoError(t, err)
	var all []*mail.Message
	for _, name := range names {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		message, err := mail.ReadMessage(bytes.NewReader(data))
		require.NoError(t, err, "%s", data)
		all = append(all, message)
	}
	return all
}

func TestOrderAndMail(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var stdout bytes.Buffer
	require.NoError(t, program(t.Context(), []string{"-dir", dir}, &stdout, &stdout))
	require.Contains(t, stdout.String(), "order-1 is placed\n")
	all := mails(t, dir)
	require.Len(t, all, 1)
	require.Equal(t, "Welcome, Ann", all[0].Header.Get("Subject"))
	require.Equal(t, `"Ann" <ann@example.com>`, all[0].Header.Get("To"))

	// The same order again is no order, and no mail.
	stdout.Reset()
	require.NoError(t, program(t.Context(), []string{"-dir", dir}, &stdout, &stdout))
	require.Equal(t, "order-1 was placed before\n", stdout.String())
	require.Len(t, mails(t, dir), 1)

	// Another order is one, under another Message-ID.
	require.NoError(t, program(t.Context(), []string{"-dir", dir, "-order", "order-2"}, &stdout, &stdout))
	all = mails(t, dir)
	require.Len(t, all, 2)
	require.NotEqual(t, all[0].Header.Get("Message-ID"), all[1].Header.Get("Message-ID"))
}

// onEngines runs the test on every engine, with the arguments that say so and
// what removes the read models, where they are not in the log's own database.
func onEngines(t *testing.T, test func(t *testing.T, dir string, args []string, forget func())) {
	nothing := func() {}
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		test(t, dir, []string{"-dir", dir}, nothing)
	})
	forgetIn := func(t *testing.T, dir string) func() {
		return func() {
			files, err := filepath.Glob(filepath.Join(dir, "state.db*"))
			require.NoError(t, err)
			require.NotEmpty(t, files)
			for _, file := range files {
				require.NoError(t, os.Remove(file))
			}
		}
	}
	t.Run("nats", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		test(t, dir, []string{"-dir", dir, "-store", "nats:" + filepath.Join(dir, "nats")}, forgetIn(t, dir))
	})
	t.Run("esdb", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		log, err := sqlite.Open(t.Context(), filepath.Join(dir, "server.db"))
		require.NoError(t, err)
		defer func() { require.NoError(t, log.Close()) }()
		server, err := esdbserver.Start(log)
		require.NoError(t, err)
		defer func() { require.NoError(t, server.Close()) }()
		test(t, dir, []string{"-dir", dir, "-store", server.URL()}, forgetIn(t, dir))
	})
}

// TestCrash_Before: the process dies when the order is stored and the mail is
// not sent. After the next start the mail is there.
func TestCrash_Before(t *testing.T) {
	t.Parallel()
	onEngines(t, func(t *testing.T, dir string, args []string, _ func()) {
		_, err := start(t, append(args, "-crash", "before")...)
		requireKilled(t, err)
		require.Empty(t, mails(t, dir))

		stdout, err := start(t, args...)
		require.NoError(t, err)
		require.Contains(t, stdout, "order-1 was placed before\n")
		require.Contains(t, stdout, `mailbox: got "Welcome, Ann" for [ann@example.com]`)
		require.Len(t, mails(t, dir), 1)
	})
}

// TestCrash_After: the process dies when the mail is sent and that is not
// recorded. The mail is sent again under its old Message-ID, so that it is in
// the mailbox once. What was recorded as sent is not sent again, even if the
// read models are lost: the record is in the log.
func TestCrash_After(t *testing.T) {
	t.Parallel()
	onEngines(t, func(t *testing.T, dir string, args []string, forget func()) {
		_, err := start(t, append(args, "-crash", "after")...)
		requireKilled(t, err)
		all := mails(t, dir)
		require.Len(t, all, 1)
		id := all[0].Header.Get("Message-ID")

		stdout, err := start(t, args...)
		require.NoError(t, err)
		require.Contains(t, stdout, "mailbox: the mail "+id+" is here already\n")
		require.Len(t, mails(t, dir), 1)

		for range 2 {
			stdout, err = start(t, args...)
			require.NoError(t, err)
			require.NotContains(t, stdout, "mailbox:", "what was recorded as sent is not sent again")
			forget()
		}
	})
}

func requireKilled(t *testing.T, err error) {
	t.Helper()
	var exit *exec.ExitError
	require.True(t, errors.As(err, &exit), "it should have died: %v", err)
	require.False(t, exit.Exited() && exit.ExitCode() == 0, "it should have died")
}

// TestServerDown: a mail that cannot be sent is tried again, with the same
// Message-ID, when its time has come.
func TestServerDown(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	// The port is kept, so that nobody else takes it: the server that is down
	// hangs up.
	hungUp := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = conn.Close()
		}
		hungUp <- err
	}()

	dir := t.TempDir()
	began := time.Date(2026, 1, 1, 9, 0, 0, 0, time.UTC)
	var attempts int
	mailer := Mailer{Port: listener.Addr().(*net.TCPAddr).Port, Before: func() { attempts++ }}
	app, err := deed.Start(t.Context(), memory.New(), orders, welcome(mailer), deed.ManualClock(began))
	require.NoError(t, err)
	defer func() { require.NoError(t, app.Stop(context.Background())) }()
	_, err = deed.Execute(t.Context(), app, orders, Place{"o1", "Ann", "ann@example.com"})
	require.NoError(t, err)
	require.NoError(t, app.AdvanceTo(t.Context(), began.Add(500*time.Millisecond)))
	require.Equal(t, 1, attempts)
	require.NoError(t, <-hungUp)

	// Now the server comes up, on that port.
	var out bytes.Buffer
	inbox := mailbox.Serve(listener, dir, &out)
	defer func() { require.NoError(t, inbox.Close()) }()
	require.NoError(t, app.AdvanceTo(t.Context(), began.Add(time.Hour)))
	require.Equal(t, 2, attempts)
	names, err := filepath.Glob(filepath.Join(dir, "*.eml"))
	require.NoError(t, err)
	require.Len(t, names, 1)
}

func TestBadFlags(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorContains(t, program(t.Context(), []string{"-crash", "never"}, &out, &out), `-crash "never": say before or after`)
	require.NoError(t, program(t.Context(), []string{"-help"}, &out, &out))
	require.Contains(t, out.String(), "-crash WHEN")
}
