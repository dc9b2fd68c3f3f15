package main

import (
	"context"
	"fmt"
	"net/url"

	"github.com/wneessen/go-mail"
)

// Mailer sends mail through a server on this machine.
type Mailer struct {
	Port int
	// At, if set, is told where the mailer is: before and after a mail.
	At func(point string)
}

// Send writes to the customer of an order. The key becomes the Message-ID, by
// which mail servers and programs recognise a mail that was sent twice.
func (m Mailer) Send(ctx context.Context, to OrderPlaced, subject, key string) error {
	message := mail.NewMsg()
	if err := message.FromFormat("The Shop", "orders@shop.example"); err != nil {
		return err
	}
	if err := message.AddToFormat(to.Name, to.Email); err != nil {
		return fmt.Errorf("address the customer: %w", err)
	}
	message.Subject(subject)
	message.SetMessageIDWithValue(url.QueryEscape(key) + "@shop.example")
	message.SetDate()
	message.SetBodyString(mail.TypeTextPlain, subject+": "+to.SKU)

	// The server is on this machine and has no certificate.
	client, err := mail.NewClient("127.0.0.1", mail.WithPort(m.Port), mail.WithTLSPolicy(mail.NoTLS), mail.WithHELO("shop.example"))
	if err != nil {
		return err
	}
	m.at("before-mail")
	if err := client.DialAndSendWithContext(ctx, message); err != nil {
		return fmt.Errorf("send %q to %q: %w", subject, to.Email, err)
	}
	m.at("after-mail")
	return nil
}

func (m Mailer) at(point string) {
	if m.At != nil {
		m.At(point)
	}
}
